"""ACE's least squares with nothing to tune: its ridge is found from the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from acemerge.linalg.gram import energies, symmetric_product
from acemerge.linalg.least_squares import Fit
from acemerge.linalg.problem import Problem, as_given
from acemerge.methods.actmat import least_squares_operations, normalised_weights
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.least_squares_rule import LeastSquaresRule
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_MOST = 0.99  # of a second moment is given up: with nothing left of any there were nothing to solve


@dataclass(frozen=True)
class _Sizes:
    """The energies of the experts that count, and how far every expert's second moment is shrunk."""

    energies: Float[Tensor, " active"]
    shrinkage: list[float]


@dataclass(frozen=True)
class AceAuto(LeastSquaresRule[_Sizes]):
    """ACE without its constants: normalised second moments, each shrunk as far as its own spectrum says.

        S_t = D_t^T D_t / n_t
        R_t = (1 - rho_t) S_t + rho_t I / in
        M   = (sum_t D_t R_t) (sum_t R_t)^(-1)
        rho_t = min(0.99, ((1 - 2/in) f_t + 1) / ((out + 1 - 2/in) (f_t - 1/in))),   f_t = ||S_t||_F^2

    rho_t is the oracle approximating shrinkage of out rows (Chen, Wiesel, Eldar and Hero 2010, arXiv 0907.4698,
    eq. 23), but never all of it: near 1/out where few directions hold the energy, most where all hold as much. Source:
    this library. Unlike `ace` nothing is centred, so that one expert gives itself whatever its rows have in common;
    second moments are always normalised, so that there is no branch and scaling all updates scales M; there is no prior
    and no refinement. `log_energy_variance`, `var(log n_t)`, which no scaling changes, is told and decides nothing; the
    manifest calls it `heterogeneity`.
    A weight multiplies R_t, and may not be negative.
    """

    name: ClassVar[str] = "ace_auto"
    source: ClassVar[str] = "acemerge, after arXiv 2603.02945"
    needs: ClassVar[Needs] = Needs(
        matrix=True, weights="not negative", work=Workspace(9, 4), factors="frame", input_side=True
    )

    scale: Scale = 1.0

    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, _Sizes] | LayerResult:
        n = energies(deltas)
        a = normalised_weights(n, layer, 2)
        if not a.any():
            return no_update(deltas)
        sides = layer.sides(deltas)
        rho = [shrinkage(D, sides) if w else 0.0 for D, w in zip(deltas, a.tolist(), strict=True)]
        pulls = [r * e / sides[1] for r, e in zip(rho, (a * n).tolist(), strict=True)]
        updates = as_given(deltas)
        problem = Problem(
            targets=updates,
            sources=updates,
            weights=[(1 - r) * w for r, w in zip(rho, a.tolist(), strict=True)],
            shape=(deltas.shape[1], deltas.shape[2]),
            pulls=pulls,
            ridge=sum(pulls),
        )
        return problem, _Sizes(n[a > 0], rho)

    def from_fit(self, fit: Fit, kept: _Sizes) -> tuple[Float[Tensor, "out in"], LayerStats]:
        variance = float(kept.energies.log().var()) if len(kept.energies) > 1 else None
        rho = tuple(round(r, 4) for r in kept.shrinkage)
        return fit.M, LayerStats(log_energy_variance=variance, shrinkage=rho)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        spread = experts * rows * columns * min(rows, columns)
        return least_squares_operations(experts, rows, columns, symmetric=True) + spread


def shrinkage(D: Float[Tensor, "out in"], sides: tuple[int, int]) -> float:
    """rho of D's second moment; `sides` (out, in) are the layer's, of which D may be a core."""
    out, columns = sides
    if columns == 1:
        return _MOST
    D = D / D.abs().amax()  # the squares of its Gram matrix may be beyond the range of float32
    gram = symmetric_product(D.T if D.shape[0] < D.shape[1] else D)
    f = float((gram / gram.trace()).square().sum())  # of the smaller Gram matrix: the other one's is the same
    spread = (out + 1 - 2 / columns) * (f - 1 / columns)
    return _MOST if spread <= 0 else min(_MOST, ((1 - 2 / columns) * f + 1) / spread)
