"""Putting sparse updates together, block by block: their sum, or the mean of those that agree in sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import largest_entry
from acemerge.methods.elementwise import Blocks, row_blocks
from acemerge.shapes import Float, Tensor

# (expert, block of rows) -> the expert's sparse and weighted update there; called once for each, in order.
Sparse = Callable[[int, slice], Tensor]
# What `total` holds, and `elected_mean`: where votes are even what either of both signs would give.
SUMMING = Blocks(block=3.0)
ELECTING = Blocks(2.25, block=10.0, block_each=2.0)


def total(deltas: Float[Tensor, "T *shape"], sparse: Sparse, scale: float) -> Float[Tensor, "*shape"]:
    """`scale sum_t sparse_t`."""
    M = torch.zeros_like(deltas[0])
    for rows in row_blocks(deltas):
        for t in range(len(deltas)):
            M[rows].add_(sparse(t, rows), alpha=scale)
    return M


def elected_mean(
    deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"], sparse: Sparse, scale: float
) -> Float[Tensor, "*shape"]:
    """`scale` times the mean of the non-zero `sparse_t` that have the elected sign.

    The sign of their sum is elected; where that is zero, or rounding, the sign that most entries of the tensor elected,
    plus if they are even. An entry that is rounding next to the tensor's largest has no say in it.
    """
    nothing = NULL * max(abs(w) * largest_entry(D) for w, D in zip(weights.tolist(), deltas, strict=True))
    M = torch.empty_like(deltas[0])
    majority, ties = 0, []
    for rows in row_blocks(deltas):
        up, down = _means_by_sign(torch.stack([sparse(t, rows) for t in range(len(deltas))]))
        sums = _decided(up, down)
        majority += _votes(sums, nothing)
        tied = (sums == 0) & (up.count > 0)
        M[rows] = torch.where((sums > 0) | tied, up.mean(), down.mean()).mul_(scale)
        if tied.any():
            ties.append((rows, tied, down.mean()[tied] * scale))
    if majority < 0:
        for rows, tied, below in ties:
            M[rows] = M[rows].masked_scatter(tied, below)
    return M


def elected_means(parts: Float[Tensor, "P T *shape"], scale: float) -> Float[Tensor, "P *shape"]:
    """The same for P small tensors at once, from their sparse updates, which are used up."""
    up, down = _means_by_sign(parts.transpose(0, 1))
    sums = _decided(up, down)
    flat = sums.flatten(1)  # (P, n)
    nothing = NULL * torch.maximum(up.sum, down.sum.neg()).flatten(1).amax(1, keepdim=True)
    plus = (flat > nothing).sum(1) >= (flat < -nothing).sum(1)  # (P,)
    tied = (sums == 0) & plus.view(-1, *[1] * (sums.ndim - 1))
    return torch.where((sums > 0) | tied, up.mean(), down.mean()).mul_(scale)


@dataclass(frozen=True)
class _Side:
    """Sum and count of the entries of one sign."""

    sum: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        return self.sum / self.count.clamp(min=1)


def _votes(sums: Tensor, nothing: float) -> int:
    """How many more entries are above `nothing` than below it on the other side."""
    return int((sums > nothing).sum()) - int((sums < -nothing).sum())


def _decided(up: _Side, down: _Side) -> Tensor:
    """The sum of both sides, zero where they cancel but for rounding."""
    sums = up.sum + down.sum
    return sums.masked_fill_(sums.abs() <= NULL * (up.sum - down.sum), 0)


def _means_by_sign(parts: Float[Tensor, "T *shape"]) -> tuple[_Side, _Side]:
    """Those above zero and those below it. `parts` is used up."""
    positive = parts.clamp(min=0)
    negative = parts.sub_(positive)
    above, below = positive.sum(0), negative.sum(0)
    return _Side(above, positive.sign_().sum(0)), _Side(below, negative.sign_().sum(0).neg_())
