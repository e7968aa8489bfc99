"""ACTMat and TACT: the task vectors' own second moments, without centring or prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.least_squares import Fit
from acemerge.linalg.problem import ALL, Experts, Problem, as_given, prefers_dual
from acemerge.linalg.select import at_least, magnitudes
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.elementwise import Average
from acemerge.methods.least_squares_rule import LeastSquaresRule
from acemerge.methods.sparse import Share, threshold
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_VOCABULARY = 20_000  # a tensor with a longer side is averaged
# In products and a solve, or where the system is many times the layer, in its pseudo-inverse.
_WORK = Workspace(8, 7, then=Workspace(3, 11))
_TRIMMING = Workspace(11, 9, then=Workspace(5, 11))

Ridge = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="ridge, as a share of the mean diagonal of sum G_t")
]
Power = Annotated[int, Field(ge=0, le=2, description="second moments are divided by n_t^(p/2)")]


@dataclass(frozen=True)
class Actmat(LeastSquaresRule[None]):
    """ACTMat: least squares with each update's own second moment as its task's.

        M = (sum_t D_t G_t) pinv(sum_t G_t),   G_t = D_t^T D_t / n_t^(p/2)

    Source: arXiv 2604.01329. Tensors with a side above 20,000 (vocabularies) are averaged; one of exactly 20,000 is
    not. A relative ridge `lam * mean(diag(sum G_t)) I`, 1e-5 to 1e-4, and p of 1 or 2 have been seen to help. A weight
    multiplies G_t, and may not be negative. Directions in which no expert moved stay at the base.
    """

    name: ClassVar[str] = "actmat"
    source: ClassVar[str] = "arXiv 2604.01329"
    needs: ClassVar[Needs] = Needs(matrix=True, weights="not negative", work=_WORK, factors="frame", input_side=True)

    lam: Ridge = 0.0
    p: Power = 0
    scale: Scale = 1.0

    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, None] | LayerResult:
        updates = as_given(deltas)
        return _problem(deltas, layer, updates, updates, self.lam, self.p, self.scale)

    def from_fit(self, fit: Fit, kept: None) -> tuple[Float[Tensor, "out in"], LayerStats]:
        return fit.M, LayerStats()

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return least_squares_operations(experts, rows, columns, symmetric=True)


@dataclass(frozen=True)
class Tact(LeastSquaresRule[None]):
    """TACT: as ACTMat, with second moments from the largest entries of each update alone.

        M = (sum_t D_t G_t) pinv(sum_t G_t),   G_t = trim(D_t)^T trim(D_t) / n_t^(p/2)

    where trim keeps the top `keep` of a tensor's n entries by magnitude, `int(keep n)` of them and at least one, with
    all that equal the smallest of these; the target keeps all of D_t. Source: arXiv 2604.01329. Weights, vocabularies
    and options as in `actmat`.
    """

    name: ClassVar[str] = "tact"
    source: ClassVar[str] = "arXiv 2604.01329"
    needs: ClassVar[Needs] = Needs(matrix=True, weights="not negative", work=_TRIMMING, input_side=True)

    keep: Annotated[Share, Field(description="share of the entries that estimate the second moment")] = 0.5
    lam: Ridge = 0.0
    p: Power = 0
    scale: Scale = 1.0

    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, None] | LayerResult:
        thresholds = [threshold(D, self.keep) for D in deltas]

        def trimmed(t: int, dtype: torch.dtype, room: Tensor | None = None, columns: slice = ALL) -> Tensor:
            D = deltas[t][:, columns]
            return (D * at_least(magnitudes(D), thresholds[t])).to(dtype)

        return _problem(deltas, layer, as_given(deltas), trimmed, self.lam, self.p, self.scale)

    def from_fit(self, fit: Fit, kept: None) -> tuple[Float[Tensor, "out in"], LayerStats]:
        return fit.M, LayerStats()

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return least_squares_operations(experts, rows, columns, symmetric=False)


def _problem(
    deltas: Float[Tensor, "T out in"],
    layer: Layer,
    targets: Experts,
    sources: Experts,
    lam: float,
    p: int,
    scale: float,
) -> tuple[Problem, None] | LayerResult:
    sides = layer.sides(deltas)
    if max(sides) > _VOCABULARY:
        mean = Average(scale).merge(deltas, layer)
        return LayerResult(mean.delta, LayerStats((Status.VOCABULARY,)))
    weights = normalised_weights(energies(deltas), layer, p)
    if not weights.any():
        return no_update(deltas)
    shape = (deltas.shape[1], deltas.shape[2])
    ridge = lam * shape[1] / sides[1]  # the mean diagonal is the layer's, of which a core lacks the zeros
    return Problem(targets, sources, weights.tolist(), shape, relative_ridge=ridge), None


def normalised_weights(n: Float[Tensor, " T"], layer: Layer, p: int) -> Float[Tensor, " T"]:
    """`w_t / n_t^(p/2)`, up to a common factor; zero for an expert without an update."""
    return torch.where(n > 0, layer.weights * (n.max() / n) ** (p / 2), 0)


def least_squares_operations(experts: int, rows: int, columns: int, symmetric: bool, spared: int = 1) -> int:
    """The products and the solve of one least-squares fit, `symmetric` where target and source are the same.

    Where second moments are formed, so many experts are spared the product with their own.
    """
    if prefers_dual(experts, rows, columns):
        stacked = experts * rows
        own = 0 if symmetric else 2 * rows * stacked * columns
        return own + stacked**2 * columns + stacked**3 // 3 + 2 * rows * stacked * (stacked + columns)
    targets = experts * rows * (3 if symmetric else 4) if rows < columns else 2 * (experts - spared) * columns
    return rows * columns * (experts * columns + targets) + columns**3 // 3 + 2 * rows * columns**2
