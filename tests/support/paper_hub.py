"""A small Hub with the papers' repositories: tiny models in their layout, and test sets of a few examples."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import make_model, perturb
from hub_server import FakeHub, Repository, contents
from PIL import Image
from safetensors.torch import load, save
from task_builders import ROOM, save_tokenizer, sentences, sharpened
from torch import Tensor

from acemerge.reproduction.pack import Pack

WEIGHTS = "model.safetensors"
_CLASSES = {"mnli": 3, "stsb": 1}
Files = dict[str, bytes]


@dataclass
class PaperHub:
    """Puts what a pack names on a fake Hub. `root` is for what has to be saved to be read."""

    hub: FakeHub
    root: Path

    def put(self, repo: str, files: Mapping[str, bytes]) -> None:
        """Add files to a repository; a data set's is `datasets/ORG/NAME`."""
        found = self.hub.repositories.setdefault(repo, Repository())
        found.commit({**found.head, **files})

    def put_model(self, model_id: str, files: Files) -> None:
        repo, _, folder = model_id.partition(":")
        self.put(repo, {f"{folder}/{name}" if folder else name: data for name, data in files.items()})

    def put_glue(self, tasks: Iterable[Mapping[str, Any]], count: int = 12) -> None:
        """Sentences, or pairs of them, with labels of every class."""
        for seed, task in enumerate(tasks):
            columns = task["text"] if isinstance(task["text"], list) else [task["text"]]
            rows = _CLASSES.get(str(task["name"]), 2)
            labels = [i / 3 for i in range(count)] if rows == 1 else [i % rows for i in range(count)]
            table = {column: sentences(count, 10 * seed + i) for i, column in enumerate(columns)} | {"label": labels}
            self.put_table(task, table)

    def put_table(self, task: Mapping[str, Any], columns: Mapping[str, Any], features: Any = None) -> None:
        from datasets import Dataset

        place = task.get("subset") or "data"
        half = len(next(iter(columns.values()))) // 2
        for i, rows in enumerate((slice(0, half), slice(half, None))):  # in two files, beside one of another split
            buffer = io.BytesIO()
            Dataset.from_dict({name: values[rows] for name, values in columns.items()}, features=features).to_parquet(
                buffer
            )
            name = f"{place}/{task['split']}-0000{i}-of-00002.parquet"
            other = f"{place}/train-0000{i}-of-00002.parquet"
            self.put(f"datasets/{task['data']}", {name: buffer.getvalue(), other: b"not wanted"})

    def saved(self, model: Any, tokenizer: bool = True, **options: Any) -> Files:
        """The files of a model's folder."""
        folder = self.root / f"saved-{len(list(self.root.iterdir()))}"
        model.save_pretrained(folder)
        if tokenizer:
            save_tokenizer(folder, **options)
        return contents(folder)


def renamed(files: Files, rename: Any, more: Mapping[str, Tensor] | None = None) -> Files:
    """The model with its tensors under other names, None to leave one out, and with more of them."""
    tensors = {rename(name): value for name, value in load(files[WEIGHTS]).items() if rename(name)}
    return files | {WEIGHTS: save(tensors | dict(more or {}), metadata={"format": "pt"})}


def put_gpt2(paper: PaperHub, pack: Pack) -> None:
    """A base as OpenAI's: no prefix on its names, the masks of its attention stored, no token for padding."""
    import transformers

    base = sharpened(make_model("gpt2", n_positions=64), 0)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    files = paper.saved(base, max_length=1024, bare=True)
    files = renamed(files, lambda n: n.removeprefix("transformer.") if "lm_head" not in n else None, masks)
    paper.put_model(pack.base, files)
    for seed, (task, expert) in enumerate(pack.experts.items(), 1):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(**{**base.config.to_dict(), "num_labels": _CLASSES.get(task, 2)})
        model = transformers.GPT2ForSequenceClassification(config)
        model.transformer.load_state_dict(base.transformer.state_dict())
        paper.put_model(expert, paper.saved(_tuned(model, seed), max_length=1024, bare=True))
    paper.put_glue(pack.tasks)


def put_roberta(paper: PaperHub, pack: Pack) -> None:
    """A masked language model with its head and pooler, and experts in folders of one repository."""
    import transformers

    classifier = sharpened(make_model("roberta", **ROOM), 0)
    base = transformers.RobertaForMaskedLM(classifier.config)
    base.roberta.load_state_dict(classifier.roberta.state_dict())
    pooler = {"roberta.pooler.dense.weight": torch.ones(16, 16), "roberta.pooler.dense.bias": torch.ones(16)}
    paper.put_model(pack.base, renamed(paper.saved(base), lambda name: name, pooler))
    for seed, (task, expert) in enumerate(pack.experts.items(), 1):
        model = make_model("roberta", seed, num_labels=_CLASSES.get(task, 2), **ROOM)
        model.roberta.load_state_dict(classifier.roberta.state_dict())
        paper.put_model(expert, paper.saved(_tuned(model, seed)))
    paper.put_glue(pack.tasks)


def put_vit(paper: PaperHub, pack: Pack) -> None:
    """A whole CLIP that has pickled weights only, experts that are its vision half without anything beside."""
    import datasets
    from transformers import CLIPImageProcessor, CLIPVisionModel

    base = sharpened(make_model("clip"), 0)
    files = paper.saved(base, max_length=12)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(paper.root / "p")
    pickled = io.BytesIO()
    torch.save(base.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}, pickled)
    del files[WEIGHTS]
    paper.put_model(pack.base, files | contents(paper.root / "p") | {"pytorch_model.bin": pickled.getvalue()})
    for seed, expert in enumerate(pack.experts.values(), 1):
        model = CLIPVisionModel(base.config.vision_config)
        inner = getattr(model, "vision_model", model)
        inner.load_state_dict(base.vision_model.state_dict())
        files = paper.saved(_tuned(model, seed), tokenizer=False)
        paper.put_model(expert, renamed(files, lambda n: "vision_model." + n.removeprefix("vision_model.")))
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for task in pack.tasks:
        images = [Image.fromarray(random.integers(0, 256, (9, 12, 3)).astype(np.uint8)) for _ in range(10)]
        labels = [i % len(task["labels"]) for i in range(10)]
        paper.put_table(task, {"image": images, "label": labels}, features)


def put_llama(paper: PaperHub, pack: Pack) -> None:
    """Language models in several shards, with running text in every column that a task reads."""
    base = sharpened(make_model("llama"), 0)
    paper.put_model(pack.base, paper.saved(base))
    for seed, expert in enumerate(pack.experts.values(), 1):
        model = make_model("llama")
        model.load_state_dict(base.state_dict())
        folder = paper.root / f"llama-{seed}"
        _tuned(model, seed).save_pretrained(folder, max_shard_size="8KB")
        save_tokenizer(folder)
        paper.put_model(expert, contents(folder))
    for seed, task in enumerate(pack.tasks):
        paper.put_table(task, {task["text"]: sentences(12, seed)})


def _tuned(model: Any, seed: int) -> Any:
    return perturb(model, seed, 0.1)
