"""Linear rules, and how a rule that looks at one entry at a time walks over a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Work
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

# Entries of one expert that are worked on at once: few enough to stay in a core's cache.
_BLOCK = 1 << 17
# What a block takes, and as much that the C library keeps of earlier ones.
_KEPT = 2
# Entries for weights, sums and thresholds; of a tensor that is smaller no more than it has.
_NUMBERS = 1 << 12


@dataclass(frozen=True)
class Blocks:
    """What a rule holds beside the task vectors that walks over them with `row_blocks`, counted in float32: so many
    tensors of the layer's size, `each` more for every expert, and in a block so many of its size, `block_each` more for
    every expert. `then` is what it holds at another time, so that the larger of both counts.
    """

    tensors: float = 1.0
    each: float = 0.0
    block: float = 0.0
    block_each: float = 0.0
    then: Work | None = None

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        count = rows * columns
        in_block = _KEPT * (self.block + self.block_each * experts) * min(count, max(_BLOCK, columns))
        own = math.ceil((self.tensors + self.each * experts) * count + in_block) + min(_NUMBERS, count)
        return max(own, 0 if self.then is None else self.then.entries(experts, rows, columns, threads))


# While the k-th largest magnitude of a tensor is found.
RANKING = Blocks(0.4, block=16.0)


@dataclass(frozen=True)
class Average:
    """Weighted mean of the task vectors, `M = sum_t w_t D_t / sum_t w_t`.

    Source: Wortsman et al. 2022, Model soups (arXiv 2203.05482). With equal weights it is the mean of the
    fine-tuned weights. Undefined, and refused, when the weights sum to zero.
    """

    name: ClassVar[str] = "average"
    source: ClassVar[str] = "arXiv 2203.05482"
    needs: ClassVar[Needs] = Needs(entrywise=True, weights="not cancelling", work=Blocks(), factors="linear")

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        total = layer.weights.sum().item()
        return LayerResult(weighted_sum(deltas, layer.weights * (self.scale / total)), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 2 * experts * rows * columns


@dataclass(frozen=True)
class TaskArithmetic:
    """Sum of the task vectors, `M = sum_t w_t D_t`, times `scale`.

    Source: Ilharco et al. 2023 (arXiv 2212.04089). The default scale 0.3 is theirs for eight experts;
    some papers use 0.4.
    """

    name: ClassVar[str] = "task_arithmetic"
    source: ClassVar[str] = "arXiv 2212.04089"
    needs: ClassVar[Needs] = Needs(entrywise=True, work=Blocks(), factors="linear")

    scale: Scale = 0.3

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        return LayerResult(weighted_sum(deltas, layer.weights * self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 2 * experts * rows * columns


def weighted_sum(deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> Float[Tensor, "*shape"]:
    """`sum_t w_t D_t`."""
    total: Tensor = torch.tensordot(weights.to(deltas.dtype), deltas, dims=1)
    return total


def row_blocks(deltas: Float[Tensor, "T *shape"]) -> Iterator[slice]:
    """Slices of a tensor's first dimension that cover it, each small enough for a core's cache."""
    rows = deltas.shape[1]
    step = max(1, _BLOCK // max(1, math.prod(deltas.shape[2:])))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
