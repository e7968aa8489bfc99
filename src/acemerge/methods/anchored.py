"""Least squares anchored at the sum of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.least_squares import Fit
from acemerge.linalg.problem import Problem, as_given
from acemerge.methods.actmat import Power, least_squares_operations, normalised_weights
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.least_squares_rule import LeastSquaresRule
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Anchored(LeastSquaresRule[None]):
    """Least squares with each update's own second moment, pulled towards the sum of the updates.

        M = (sum_t D_t G_t + l sum_t D_t) (sum_t G_t + l I)^(-1),   G_t = D_t^T D_t / n_t^(p/2)
        l = lam * mean(diag(sum_t G_t)),   the minimiser of
        sum_t ||(M - D_t) D_t^T||_F^2 / n_t^(p/2) + l ||M - sum_t D_t||_F^2

    Source: this library. Where the experts' energy is well below the average nobody is disturbed and updates add up;
    where they share energetic directions their second moments decide. Scaling all updates scales M. `lam` to infinity
    gives the sum, to 0 actmat with this p; experts that share no input direction are all kept whole.
    T equal experts U diag(s) V^T give singular values `s_i (s_i^2 + T h) / (s_i^2 + h)`, `h = lam mean(s^2)`
    over all inputs: the expert in its energetic directions, T of it in faint ones, for the rule takes equal updates
    for T tasks that agree. An expert that is there twice by mistake is to be left out.
    A weight multiplies G_t and the expert in the sum, and may not be negative: a weight of 2 is the expert twice.
    """

    name: ClassVar[str] = "anchored"
    source: ClassVar[str] = "acemerge"
    needs: ClassVar[Needs] = Needs(
        matrix=True, weights="not negative", work=Workspace(9, 4), factors="frame", input_side=True
    )

    lam: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="pull to the sum, as a share of the mean diagonal")
    ] = 1.0
    p: Power = 1
    scale: Scale = 1.0

    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, None] | LayerResult:
        n = energies(deltas)
        a = normalised_weights(n, layer, self.p)
        if not a.any():
            return no_update(deltas)
        ridge = self.lam * float(a @ n) / layer.sides(deltas)[1]  # l: a Gram matrix's diagonal sums to the energy
        updates = as_given(deltas)
        problem = Problem(
            targets=updates,
            sources=updates,
            weights=a.tolist(),
            shape=(deltas.shape[1], deltas.shape[2]),
            pulls=(ridge * layer.weights).tolist(),
            ridge=ridge,
        )
        return problem, None

    def from_fit(self, fit: Fit, kept: None) -> tuple[Float[Tensor, "out in"], LayerStats]:
        return fit.M, LayerStats()

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return least_squares_operations(experts, rows, columns, symmetric=True)
