"""Held-out accuracy of a model with a linear head on its mean-pooled tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from experts import pooled, reader
from safetensors.torch import load_file
from tasks import Task, read
from torch import Tensor, nn

_BATCH = 64


@torch.no_grad()
def accuracy(encoder: nn.Module, head: Mapping[str, Tensor], task: Task, data: Path, base: Path, most: int) -> float:
    """Share of the first `most` held-out examples that are labelled rightly."""
    labels = json.loads((data / "labels.json").read_text())
    rows, encode = read(data, "test")[:most], reader(base, task)
    right = 0
    for batch in _of_like_length(rows):
        logits = nn.functional.linear(
            pooled(encoder, encode(batch)), head["classifier.weight"], head["classifier.bias"]
        )
        right += sum(labels[guess] == row["label"] for guess, row in zip(logits.argmax(1), batch, strict=True))
    return right / len(rows)


def _of_like_length(rows: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Batches that need little padding; it changes no answer."""
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    yield from (ordered[i : i + _BATCH] for i in range(0, len(ordered), _BATCH))


def head_of(file: Path) -> dict[str, Any]:
    """The head in an expert's own weights, or in what a merge wrote to `heads/`."""
    return {name: value for name, value in load_file(file).items() if name.startswith("classifier.")}


def normalised(scores: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """Mean over the tasks of accuracy / the expert's own."""
    return sum(scores[name] / experts[name] for name in scores) / len(scores)
