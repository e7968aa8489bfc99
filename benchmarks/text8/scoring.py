"""Held-out accuracy of a model with a linear head on its mean-pooled tokens, by the parts of `acemerge evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tasks import Task, read

from acemerge.evaluation.data import as_classes
from acemerge.evaluation.heads import find_heads
from acemerge.evaluation.metrics import METRICS
from acemerge.evaluation.models import open_model, pooled
from acemerge.evaluation.predict import encode, score, text_batches

_BATCH = 64
_CPU = torch.device("cpu")


def accuracy(folder: Path, expert: Path, task: Task, data: Path, base: Path, most: int) -> float:
    """Share of the first `most` held-out examples that are labelled rightly.

    The head is the one that a merge wrote beside the model, else the expert's; the tokenizer is the base's.
    """
    rows = read(data, "test")[:most]
    texts = [[row[column] for row in rows] for column in ("text", "text_pair") if column in rows[0]]
    classes = as_classes([row["label"] for row in rows], json.loads((data / "labels.json").read_text()), data)
    model, tokenizer = open_model(str(folder), _CPU), open_model(str(base), _CPU).tokenizer()
    heads = find_heads(task.name, task.name, model.checkpoint, open_model(str(expert), _CPU).checkpoint)
    encoded = encode(tokenizer, texts, task.tokens)
    batch, logits = text_batches(tokenizer, encoded), pooled(model, "mean", heads).logits
    scores = score(logits, batch, encoded.lengths, _BATCH, _CPU, lambda *_: None)
    return METRICS["accuracy"](classes, scores.argmax(1))


def normalised(scores: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """Mean over the tasks of accuracy / the expert's own."""
    return sum(scores[name] / experts[name] for name in scores) / len(scores)
