"""Rules that look at one entry of the task vectors at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.errors import UsageError
from acemerge.methods.base import LayerResult
from acemerge.shapes import Float, Tensor

Scale = Annotated[float, Field(allow_inf_nan=False, description="factor on the merged update")]


@dataclass(frozen=True)
class Average:
    """Weighted mean of the task vectors, `M = sum_t w_t D_t / sum_t w_t`.

    Source: Wortsman et al. 2022, Model soups (arXiv 2203.05482). With equal weights it is the mean of the
    fine-tuned weights. Raises UsageError when the weights sum to zero.
    """

    name: ClassVar[str] = "average"
    source: ClassVar[str] = "arXiv 2203.05482"
    requires_matrix: ClassVar[bool] = False

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> LayerResult:
        total = weights.sum().item()
        if total == 0:
            raise UsageError("average", "the expert weights sum to zero", "change the weights")
        return LayerResult(weighted_sum(deltas, weights * (self.scale / total)), {"status": "ok"})

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
    requires_matrix: ClassVar[bool] = False

    scale: Scale = 0.3

    def merge(self, deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> LayerResult:
        return LayerResult(weighted_sum(deltas, weights * self.scale), {"status": "ok"})

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 2 * experts * rows * columns


def weighted_sum(deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> Float[Tensor, "*shape"]:
    """`sum_t w_t D_t`."""
    total: Tensor = torch.tensordot(weights.to(deltas.dtype), deltas, dims=1)
    return total
