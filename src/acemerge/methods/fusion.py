"""Selective fusion: of an expert's changes only those that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from acemerge.linalg.select import kth_largest_magnitude
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, no_update
from acemerge.methods.elementwise import Blocks, row_blocks
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_LEAST = 1e-8  # added to probabilities
_NO_DIVERGENCE = 2.0**-44  # what the rounding of float64 leaves of none


@dataclass(frozen=True)
class ArceeFusion:
    """Arcee fusion: of one expert's changes keep those whose importance is an outlier among all of the tensor.

        S = |D| KL(softmax(W_1) || softmax(W_0)),   the softmax and the divergence by rows
        M = D where S >= q_2 + 1.5 (q_3 - q_1), else 0

    `q_1`, `q_2` and `q_3` are the quartiles of S, each the entry at `floor(i (n - 1) / 4)` of the n in order. Source:
    mergekit 0.1.5, `arcee_fusion`. Other than there the quartiles of tensors with more than a million entries are
    exact, not those of a sample. A weight multiplies the task vector.
    """

    name: ClassVar[str] = "arcee_fusion"
    source: ClassVar[str] = "mergekit 0.1.5"
    needs: ClassVar[Needs] = Needs(base=True, most_experts=1, work=Blocks(4.25, block=16.0))

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        D = deltas[0] * layer.weights[0].item()
        if not D.any():
            return no_update(deltas)
        S = importance(D, torch.zeros_like(D) if layer.base is None else layer.base)
        places = [S.numel() - i * (S.numel() - 1) // 4 for i in (1, 2, 3)]
        q1, q2, q3 = torch.tensor([kth_largest_magnitude(S.flatten(), k) for k in places], dtype=S.dtype).to(S.device)
        kept = S.ge(q2 + 1.5 * (q3 - q1))  # in the type of S, whose rounding decides where entries are equal
        share = kept.sum().item() / kept.numel()
        return LayerResult(D.mul_(kept).mul_(self.scale), LayerStats(kept=share))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 30 * rows * columns


def importance(D: Float[Tensor, "*shape"], W0: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`|D|` times the divergence of each row's softmax from that of `W0`, in float64: it is often small."""
    columns = D.shape[-1] if D.ndim else 1
    S, changes, bases = D.new_empty(D.shape), D.reshape(-1, columns), W0.reshape(-1, columns)
    for rows in row_blocks(changes[None]):
        before = bases[rows].double()
        p = (before + changes[rows]).softmax(-1) + _LEAST
        q = before.softmax(-1) + _LEAST
        divergence = (p * (p / q).log()).sum(-1, keepdim=True)
        S.view(-1, columns)[rows] = changes[rows].abs() * divergence * (divergence > _NO_DIVERGENCE)
    return S
