"""Tiny models with tokenizers, heads and task files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from builders import make_model, perturb
from safetensors.torch import load_file, save_file

WORDS = ("the", "a", "cat", "dog", "bird", "fish", "sees", "eats", "red", "blue", "old", "young", "and", "here", "now")
ROOM = {"max_position_embeddings": 32}


def save_tokenizer(folder: Path, max_length: int = 20, bare: bool = False, **special: str) -> None:
    """One token a word, as the tiny models number the special ones; pairs with `[SEP]` between.

    A bare one adds nothing to a text and has no token for padding, as GPT-2's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not bare:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
    special |= {"eos_token": "[SEP]"} if bare else {"pad_token": "[PAD]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, unk_token="[UNK]", **special
    ).save_pretrained(folder)


def sentences(count: int, seed: int, longest: int = 7) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def save_model(folder: Path, model: Any, **changes: Any) -> Path:
    """The model and a tokenizer, with changes of its configuration."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharpened(model: Any, seed: int) -> Any:
    """Moved far enough that inputs make a difference to its answer."""
    return perturb(model, seed, 0.7)


def undecided(model: Any) -> Any:
    """A classifier whose answer hangs on the text: its mean scores over some texts are zero."""
    texts = torch.randint(4, 4 + len(WORDS), (64, 6), generator=torch.Generator().manual_seed(0))
    texts[:, 0], texts[:, -1] = 0, 1
    with torch.no_grad():
        model.classifier.out_proj.bias -= model(input_ids=texts).logits.mean(0)
    return model


def save_family(root: Path, rows: dict[str, int], base_rows: int = 2) -> Path:
    """A base and an expert for each task, each with a head of so many rows: RoBERTa classifiers."""
    base = sharpened(make_model("roberta", num_labels=base_rows, **ROOM), 0)
    save_model(root / "base", base)
    shared = {name: value for name, value in base.state_dict().items() if not name.startswith("classifier.out_proj.")}
    for seed, (task, count) in enumerate(rows.items(), 1):
        expert = make_model("roberta", seed, num_labels=count, **ROOM)
        sharpened(expert, seed).load_state_dict(shared, strict=False)
        save_model(root / task, undecided(perturb(expert, seed)))
    return root


def save_encoder(folder: Path, seed: int, rows: int | None = None) -> Path:
    """A BERT encoder alone, as sentence encoders are kept; with `rows` also a linear head beside it."""
    folder.mkdir(parents=True)
    model = sharpened(make_model("bert", **ROOM), 7 if rows is None else seed).bert
    save_model(folder, model)
    if rows is not None:
        generator = torch.Generator().manual_seed(seed)
        head = {
            "classifier.weight": torch.randn(rows, 16, generator=generator),
            "classifier.bias": torch.randn(rows, generator=generator),
        }
        tensors = load_file(folder / "model.safetensors") | head
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tsv(path: Path, columns: dict[str, list[Any]]) -> Path:
    lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tasks(root: Path, *tasks: dict[str, Any], **keys: Any) -> Path:
    path = root / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": list(tasks), **keys}))
    return path
