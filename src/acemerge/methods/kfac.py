"""Least squares on both sides, weighted by what was measured there: K-FAC's factors of each expert's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.select import largest_entry
from acemerge.linalg.solve import invert
from acemerge.linalg.two_sided import Map, conjugate_gradients, dot, solving_dtype
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.both_sides import reached
from acemerge.methods.elementwise import Average
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_DAMPING = 0.1  # of the mean eigenvalue of the pooled moments, as in kron_auto
_USUAL = 20  # steps to the default tol


@dataclass(frozen=True)
class Kfac:
    """Least squares weighted on both sides by K-FAC's factors, measured on each expert's own examples.

        X minimises  sum_t ||A_t^(1/2) (X - D_t) S_t^(1/2)||_F^2 + lam ||L^(1/2) X R^(1/2)||_F^2
        sum_t A_t X S_t + lam L X R = B = sum_t A_t D_t S_t,   M = X <X, B> / sum_t <X, A_t X S_t>
        S_t = Z_t^T Z_t / N,  A_t = G_t^T G_t / N,  each over its mean eigenvalue
        L = sum_t A_t / T^(1/2) + 0.1 T^(1/2) I,  R = sum_t S_t / T^(1/2) + 0.1 T^(1/2) I

    of the inputs Z_t (N, in) of the layer in expert t's network and the gradients G_t (N, out) of the log likelihood at
    its outputs, on data of its own, labels drawn from the expert's own answers; see `--calibration`. The objective
    is the second order of the experts' losses, up to the pull, with their Fisher information as Kronecker products
    (Martens and Grosse 2015, arXiv 1503.05671). Source: this library. System, pull and preconditioner are those of
    `kron_auto`, whose moments are the updates' own; the factor is the one that fits best, as it is.
    By conjugate gradients, until the residual is `tol` of the right-hand side, or for `steps` steps: then `status` is
    "not converged". Scaling all updates scales M. One expert gives itself. One without an update has its say where its
    data lies, as in `regmean`; one whose data did not reach the layer has none. A weight multiplies an expert's
    terms, and may not be negative. A layer that was not seen is averaged, and the status says so.
    """

    name: ClassVar[str] = "kfac"
    source: ClassVar[str] = "acemerge, after arXiv 1503.05671"
    needs: ClassVar[Needs] = Needs(
        matrix=True, weights="not negative", work=Workspace(14, 12, "longer", each=4), calibration="both sides"
    )

    lam: Annotated[float, Field(gt=0, allow_inf_nan=False, description="pull to no update")] = 0.01
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of conjugate gradients, at most")] = 300
    tol: Annotated[float, Field(gt=0, lt=1, description="residual to reach, as a share of the right-hand side")] = 1e-3
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        if not layer.weights.any() or not energies(deltas).any():
            return no_update(deltas)
        dtype = solving_dtype(deltas, self.tol)
        experts = [] if layer.moments is None else _experts(deltas, layer.moments, layer.weights.tolist(), dtype)
        if not experts:
            return LayerResult(Average(self.scale).merge(deltas, layer).delta, LayerStats((Status.UNSEEN,)))
        if len(experts) == 1:
            return LayerResult(self.scale * deltas[experts[0].number], LayerStats(steps=0, residual=0.0))
        size = max(largest_entry(deltas[one.number]) for one in experts) or 1.0
        M, stats = self._solved(deltas, experts, size, dtype)
        return LayerResult(M.mul_(self.scale).to(deltas.dtype), stats)

    def _solved(
        self, deltas: Tensor, experts: list[_Expert], size: float, dtype: torch.dtype
    ) -> tuple[Tensor, LayerStats]:
        B, pull = torch.zeros_like(deltas[0], dtype=dtype), 0.0
        for one in experts:
            own = one.applied(deltas[one.number].to(dtype) / size)
            pull += float(own.norm())
            B.add_(own)

        def applied(X: Tensor) -> Tensor:
            total = experts[0].applied(X)
            for one in experts[1:]:
                total.add_(one.applied(X))
            return total

        floor = 16 * torch.finfo(dtype).eps * pull
        found = conjugate_gradients(applied, _pooled_inverse(experts), B, self.steps, self.tol, floor, self.lam)
        b = dot(found.X, B)
        h = b - self.lam * found.pulled  # where conjugate gradients are, <X, H X + lam P X> = <X, B>
        stats = LayerStats((reached(found.residual <= self.tol, False),), steps=found.steps, residual=found.residual)
        return found.X.mul_(size * b / h if h > 0 else 0.0), stats

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With the steps that it usually takes."""
        step = 2 * (experts + 1) * rows * columns * (rows + columns)
        return (rows**3 + columns**3) // 3 + (min(self.steps, _USUAL) + 1) * step


@dataclass(frozen=True)
class _Expert:
    """`w A X S` of one expert, whose moments are a multiple of those with mean eigenvalue one."""

    number: int
    weight: float
    A: Float[Tensor, "out out"]
    S: Float[Tensor, "in in"]

    @property
    def factors(self) -> tuple[float, float]:
        """What A and S are to be multiplied by."""
        return len(self.A) / float(self.A.trace()), len(self.S) / float(self.S.trace())

    def applied(self, X: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        a, s = self.factors
        return (self.A @ X @ self.S).mul_(self.weight * a * s)


def _experts(deltas: Tensor, moments: Tensor, weights: list[float], dtype: torch.dtype) -> list[_Expert]:
    """Those that have a weight, and whose data reached the layer."""
    found = []
    for t, weight in enumerate(weights):
        S, A = both_moments(moments[t].to(dtype), deltas.shape[1], deltas.shape[2])
        if weight and float(S.trace()) > 0 and float(A.trace()) > 0:
            found.append(_Expert(t, weight, A, S))
    return found


def both_moments(
    moments: Float[Tensor, " n"], rows: int, columns: int
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    """The two moments of a layer (out, in) that `Needs.calibration` "both sides" has one after the other."""
    S, A = moments.split([columns**2, rows**2])
    return S.view(columns, columns), A.view(rows, rows)


def _pooled_inverse(experts: list[_Expert]) -> Map:
    """`X -> L^(-1) X R^(-1)`."""
    total = sum(one.weight for one in experts)
    L, R = torch.zeros_like(experts[0].A), torch.zeros_like(experts[0].S)
    for one in experts:
        a, s = one.factors
        L.add_(one.A, alpha=one.weight * a / total**0.5)
        R.add_(one.S, alpha=one.weight * s / total**0.5)
    for side in (L, R):
        side.diagonal().add_(_DAMPING * total**0.5)
    of_rows, of_columns = invert(L), invert(R)
    return lambda X: of_columns(of_rows(X.T).T)
