"""Perplexity of a causal language model: how unlikely it finds a text, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.errors import NumericalError, UsageError
from acemerge.shapes import Float, Int, Tensor
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE, OnBatch, taking_examples

_LARGEST = 307 * np.log(10)  # a broken merge is still a row of the table


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` are read, those from `scored` on are scored."""

    begin: int
    scored: int
    end: int


def windows(count: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens that move by `stride`, so that each token but the first is scored exactly once.

    A token is scored by the first window that it is in; all but those of the first window have at least
    `context - stride` tokens before them.
    """
    found = [Window(0, 1, min(context, count))]
    while found[-1].end < count:
        begin = found[-1].begin + stride
        # With stride == context the first token of a window would have nothing before it: begin one earlier.
        begin = min(begin, found[-1].end - 1)
        found.append(Window(begin, found[-1].end, min(begin + context, count)))
    return found


def token_losses(logits: Float[Tensor, "L V"], tokens: Int[Tensor, "L"], first: int) -> Float[Tensor, "S"]:
    """`-log p(token i | those before)` for i from `first` to L - 1, in nats; the softmax in float32 or wider."""
    wide = logits[first - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, tokens[first:], reduction="none")


@dataclass(frozen=True)
class Losses:
    """Of every window the sum of its tokens' losses, float64, and their number."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    def perplexity(self, rows: npt.NDArray[np.int64] | slice = slice(None)) -> float:
        """`exp(mean loss)` over the tokens of these windows; from 1e307 on, just that."""
        return float(np.exp(min(self.sums[rows].sum() / self.counts[rows].sum(), _LARGEST)))


def text_losses(
    network: Any, tokens: Int[Tensor, "N"], context: int, stride: int, batch_size: int, on_batch: OnBatch
) -> Losses:
    """The losses of a text of at least two tokens."""
    if len(tokens) < 2:
        raise UsageError("tasks", "the text has fewer than two tokens", "name a longer text")
    found = windows(len(tokens), context, stride)
    sums, counts = [], []
    with torch.inference_mode():
        for batch in _of_one_length(found, batch_size):
            ids = torch.stack([tokens[w.begin : w.end] for w in batch]).to(network.device)
            with taking_examples("tasks", ids.device):
                logits = network(input_ids=ids).logits
            for window, row, row_ids in zip(batch, logits, ids, strict=True):
                losses = token_losses(row, row_ids, window.scored - window.begin)
                sums.append(losses.double().sum().item())
                counts.append(len(losses))
            on_batch(len(sums), len(found))
    if not np.isfinite(sums).all():
        raise NumericalError("tasks", "the model's losses are not finite", ARE_WEIGHTS_FINITE)
    return Losses(np.array(sums), np.array(counts))


def _of_one_length(found: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Neighbours of one length, at most `size` together: only the last window is shorter."""
    batch: list[Window] = []
    for window in found:
        if batch and (len(batch) == size or window.end - window.begin != batch[0].end - batch[0].begin):
            yield batch
            batch = []
        batch.append(window)
    yield batch
