"""RoBERTa classifiers with texts to calibrate on, and what is computed by hand of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import load_folder
from task_builders import sentences
from torch import Tensor

import acemerge
from acemerge.tasks.task_file import load_tasks

TEXTS = sentences(9, seed=1)
EXPERTS = {"topic": 3, "tone": 2}


def merge(root: Path, method: str, out: str = "out", **options: Any) -> acemerge.MergeReport:
    experts = [root / name for name in EXPERTS]
    given = {"calibration": str(root / "tasks.yaml"), **options}
    return acemerge.merge(root / "base", experts, method, root / out, **given)


def moments_of(root: Path, model: Path, number: int) -> dict[str, Tensor]:
    task = load_tasks(root / "tasks.yaml", labelled=False).tasks[number]
    return dict(acemerge.input_second_moments(model, task))


def examples(root: Path, number: int) -> list[dict[str, Tensor]]:
    """Every text by itself, as the model takes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    return [tokenizer(text, return_tensors="pt") for text in (TEXTS, sentences(6, seed=2))[number]]


def task_vectors(root: Path, name: str) -> tuple[Tensor, Tensor]:
    base, *experts = (load_folder(root / folder)[name].double() for folder in ("base", *EXPERTS))
    return base, torch.stack(experts) - base


def second_moment(rows: list[Tensor]) -> Tensor:
    Z = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double()
    return Z.T @ Z / len(Z)
