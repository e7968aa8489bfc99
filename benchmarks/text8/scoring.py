"""Held-out accuracy of a model with a linear head on its mean-pooled tokens, by the parts of `acemerge evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tasks import Task, read
from torch import Tensor

from acemerge.tasks.data import as_classes
from acemerge.tasks.heads import find_heads
from acemerge.tasks.networks import open_model, pooled
from acemerge.tasks.predict import encode, score, text_batches

_BATCH = 64
_CPU = torch.device("cpu")


def hits(folder: Path, expert: Path, task: Task, data: Path, base: Path, most: int) -> Tensor:
    """Whether each of the first `most` held-out examples is labelled rightly, (examples,).

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
    return torch.as_tensor(scores.argmax(1)) == torch.as_tensor(classes)
