"""Rules that merge by what was measured on data: input second moments, or squared gradients, of every expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.least_squares import least_squares_trusted
from acemerge.linalg.problem import ALL, Problem, as_given
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.elementwise import Average
from acemerge.methods.least_squares_rule import with_fit
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

Shrinkage = Annotated[
    float, Field(ge=0, le=1, allow_inf_nan=False, description="factor on the second moments off the diagonal")
]
_WORK = Workspace(6, 6, "columns")


@dataclass(frozen=True)
class RegMean:
    """RegMean: the merge whose outputs are nearest to each expert's, on that expert's own inputs.

        M = (sum_t D_t G_t) (sum_t G_t)^(-1),   G_t = Z_t^T Z_t / N, off the diagonal times a

    with the N inputs Z_t (N, in) of the layer in expert t's network on its own data; see `--calibration`. It minimises
    `sum_t ||Z_t (M - D_t)^T||_F^2 / N` where a = 1. Source: Jin et al. 2023 (arXiv 2212.09849), a = 0.9.
    Departure: N is each expert's own, so that an expert with more data has no more say. A weight multiplies G_t, and
    may not be negative. Input directions that no data reaches stay at the base. A layer whose inputs were not seen is
    averaged, and the status says so.
    """

    name: ClassVar[str] = "regmean"
    source: ClassVar[str] = "arXiv 2212.09849"
    needs: ClassVar[Needs] = Needs(matrix=True, weights="not negative", work=_WORK, calibration="inputs")

    a: Shrinkage = 0.9
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        return _regression(deltas, layer, self.a, self.scale)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return _operations(experts, rows, columns)


@dataclass(frozen=True)
class RegMeanPp:
    """RegMean++: RegMean block by block, the inputs of a block taken through the blocks that are merged already.

    The formula is `regmean`'s. G_t is of expert t's own block, on its own data, behind merged embeddings and blocks.
    A block is what has one number in the tensors' names, as `encoder.layer.3`. Source: Nguyen et al. 2025
    (arXiv 2508.03121). Weights, `a` and departures as in `regmean`.
    """

    name: ClassVar[str] = "regmean_pp"
    source: ClassVar[str] = "arXiv 2508.03121"
    needs: ClassVar[Needs] = Needs(matrix=True, weights="not negative", work=_WORK, calibration="merged inputs")

    a: Shrinkage = 0.9
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        return _regression(deltas, layer, self.a, self.scale)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return _operations(experts, rows, columns)


@dataclass(frozen=True)
class Fisher:
    """Fisher-weighted average of the weights, entry by entry.

        M = sum_t (F_t + floor) D_t / sum_t (F_t + floor),   F_t = mean_n (d log p(y_n | x_n) / d W)^2

    over the N examples of expert t's own data; see `--calibration`. Source: Matena and Raffel 2022 (arXiv 2111.09832).
    Departures: y_n is the data's label, and only where there is none drawn from the model's own answer, which the paper
    always does; only what the policy gives to the rule, linear layers by default, is weighted, where the paper weighs
    every tensor. F_t counts as it is, where FusionBench by default divides it by its norm over all of an expert's
    tensors, and squares the gradient of a batch's sum. A weight multiplies an expert's terms, and may not be negative.
    A tensor without gradients is averaged, and the status says so.
    """

    name: ClassVar[str] = "fisher"
    source: ClassVar[str] = "arXiv 2111.09832"
    needs: ClassVar[Needs] = Needs(weights="not negative", calibration="gradients")

    floor: Annotated[float, Field(gt=0, allow_inf_nan=False, description="added to every squared gradient")] = 1e-6
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        if not layer.weights.any():
            return no_update(deltas)
        if layer.moments is None:
            return _averaged(deltas, layer, self.scale)
        total, merged = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for D, F, weight in zip(deltas, layer.moments, layer.weights.tolist(), strict=True):
            precision = weight * (F.to(D.dtype) + self.floor)
            total += precision
            merged.addcmul_(precision, D)
        return LayerResult(merged.div_(total).mul_(self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 5 * experts * rows * columns


def _regression(deltas: Float[Tensor, "T out in"], layer: Layer, a: float, scale: float) -> LayerResult:
    moments = layer.moments
    if not layer.weights.any():
        return no_update(deltas)
    if moments is None or not moments.any():
        return _averaged(deltas, layer, scale)

    def shrunk(t: int, dtype: torch.dtype, room: Tensor | None = None, columns: slice = ALL) -> Tensor:
        G = moments[t].to(dtype)
        shrunk: Tensor = a * G
        shrunk.diagonal().copy_(G.diagonal())
        return shrunk[:, columns]

    shape = (deltas.shape[1], deltas.shape[2])
    problem = Problem(as_given(deltas), shrunk, layer.weights.tolist(), shape, measured=True)
    fit = least_squares_trusted(problem, deltas.dtype, deltas.device)
    return LayerResult((scale * fit.M).to(deltas.dtype), with_fit(LayerStats(), fit))


def _averaged(deltas: Float[Tensor, "T *shape"], layer: Layer, scale: float) -> LayerResult:
    return LayerResult(Average(scale).merge(deltas, layer).delta, LayerStats((Status.UNSEEN,)))


def _operations(experts: int, rows: int, columns: int) -> int:
    return 2 * (experts - 1) * rows * columns**2 + columns**3 // 3 + 2 * rows * columns**2
