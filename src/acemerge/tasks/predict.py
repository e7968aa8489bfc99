"""Examples through a network, in batches of one length each as nearly as may be; the order stays the examples'."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.checkpoints.hub import in_words
from acemerge.errors import CheckpointError, NumericalError, ResourceError, UsageError, shortage_of
from acemerge.shapes import Tensor
from acemerge.tasks.networks import Inputs, Logits

# Told after every batch: how many examples are done, of how many.
OnBatch = Callable[[int, int], None]
# Of any model, where `acemerge verify` is of merges.
ARE_WEIGHTS_FINITE = "acemerge inspect --base MODEL --expert MODEL tells whether its weights are"
SMALLER = "use a smaller batch_size, max_length or context"
# Where what is run may be text of the model's own, which has none of these.
SMALLER_TASKS = "give tasks with a smaller batch_size, max_length or context by --calibration TASKS.yaml"
Batches = Callable[[Sequence[int]], Inputs]  # the examples of these numbers


@dataclass(frozen=True)
class Encoded:
    """Texts as token numbers; `cut` counts those that were longer than allowed."""

    rows: Sequence[dict[str, list[int]]]
    cut: int

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.rows]


def encode(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int | None) -> Encoded:
    """One text for each example, or the two of a pair; cut at `max_length` tokens.

    Without it at 128, as GLUE's own runs do, or at what the model can take.
    """
    if max_length is None:
        max_length = min(128, tokenizer.model_max_length)
    if max_length > tokenizer.model_max_length:
        what = f"max_length {max_length} is over the model's {tokenizer.model_max_length}"
        raise UsageError("tasks", what, "use a smaller max_length")
    whole = tokenizer(*texts)["input_ids"]
    kept = tokenizer(*texts, truncation=True, max_length=max_length)
    rows = [{key: kept[key][i] for key in kept} for i in range(len(whole))]
    return Encoded(rows, sum(len(ids) > max_length for ids in whole))


def text_batches(tokenizer: Any, encoded: Encoded) -> Batches:
    """Batches of texts, padded where they differ in length."""

    def batch(rows: Sequence[int]) -> Inputs:
        several = [encoded.rows[i] for i in rows]
        if len({len(row["input_ids"]) for row in several}) > 1:
            padded = tokenizer.pad(several, return_tensors="pt")
            return dict(padded)
        return {key: torch.tensor([row[key] for row in several]) for key in several[0]}

    return batch


@contextlib.contextmanager
def taking_examples(where: str, device: torch.device, cure: str = SMALLER) -> Iterator[None]:
    """What a network raises for examples that it cannot be given, or for which there is no memory, in words."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError, MemoryError) as failure:
        if shortage_of(failure) is not None:
            cure = cure if device.type == "cpu" else f"{cure}, or --device cpu"
            raise ResourceError(where, f"a batch does not fit in the memory of device {device}", cure) from failure
        what = f"the model cannot be given these examples ({in_words(failure)})"
        raise CheckpointError(where, what, "check its tokenizer and max_length") from failure


def score(
    logits: Logits,
    batch: Batches,
    lengths: Sequence[int],
    batch_size: int,
    device: torch.device,
    on_batch: OnBatch,
) -> npt.NDArray[np.float32]:
    """The scores (N, rows) of every example, whose `lengths` are given. NumericalError for what is not finite."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # the largest batch first: memory fails at once
    parts: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = {key: value.to(device) for key, value in batch(rows).items()}
            with taking_examples("tasks", device):
                parts.append(logits(inputs).float().cpu())
            on_batch(start + len(rows), len(order))
    sorted_scores = torch.cat(parts)
    scores = torch.empty_like(sorted_scores)
    scores[torch.tensor(order)] = sorted_scores
    if not scores.isfinite().all():
        raise NumericalError("tasks", "the model's scores are not finite", ARE_WEIGHTS_FINITE)
    return scores.numpy()
