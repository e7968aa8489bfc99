"""Least squares with a weight on the outputs as well as on the inputs, anchored at the sum of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.two_sided import (
    conjugate_gradients,
    forms_sides,
    preconditioner,
    refines,
    root_sides,
    solving_dtype,
)
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Work, no_update
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Upright:
    """The experts with an update and a weight, transposed where they have more columns than rows.

    Rules with a weight on both sides merge the transposes to the transpose. `sizes` are the layer's, turned alike.
    """

    experts: list[Tensor]
    weights: list[float]
    sizes: tuple[int, int]
    turned: bool

    def turned_back(self, M: Float[Tensor, "rows columns"]) -> Float[Tensor, "out in"]:
        return M.T if self.turned else M


def upright(deltas: Float[Tensor, "T out in"], layer: Layer) -> Upright | None:
    """None where no expert has both."""
    kept: list[int] = ((energies(deltas) > 0) & (layer.weights > 0)).nonzero().flatten().tolist()
    if not kept:
        return None
    rows, columns = layer.sides(deltas)
    turned = deltas.shape[1] < deltas.shape[2]
    experts = [deltas[t].T if turned else deltas[t] for t in kept]
    return Upright(experts, layer.weights[kept].tolist(), (columns, rows) if turned else (rows, columns), turned)


@dataclass(frozen=True)
class Kron:
    """Least squares on both sides: an error counts where an expert's inputs are, and its outputs.

        M minimises  sum_t ||A_t^(1/2) (M - D_t) S_t^(1/2)||_F^2 + l ||M - sum_t D_t||_F^2,   l = lam T
        sum_t A_t M S_t + l M = sum_t A_t D_t S_t + l sum_t D_t
        A_t = (D_t D_t^T)^(1/2),  S_t = (D_t^T D_t)^(1/2),  each over its mean eigenvalue

    Source: this library. The root, because gradient descent on a linear layer gives `D = (W* - W_0) Sigma const` for
    inputs of covariance Sigma, so that `D^T D` is about its square. By conjugate gradients from `sum_t D_t`, until the
    residual is `tol` of what it was, or for `steps` steps: then `status` is "not converged", and `residual` how far it
    came. Experts without an update drop out of T. Scaling all updates scales M. `lam` to infinity gives the sum, and
    experts that share no input direction or no output direction are all kept whole. T equal experts U diag(s) V^T give
    singular values `s_i (c s_i^2 + lam T) / (c s_i^2 + lam)`, `c = out in / (sum_j s_j)^2`: the expert in its energetic
    directions, T of it in faint ones, for the rule takes equal updates for T tasks that agree. An expert that is there
    twice by mistake is to be left out.
    A weight multiplies an expert's term, its share of T and the expert in the sum, and may not be negative: a weight
    of 2 is the expert twice.
    """

    name: ClassVar[str] = "kron"
    source: ClassVar[str] = "acemerge"

    lam: Annotated[float, Field(gt=0, allow_inf_nan=False, description="pull to the sum, for each expert")] = 0.1
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of conjugate gradients, at most")] = 30
    tol: Annotated[float, Field(gt=0, lt=1, description="residual to reach, as a share of the sum's")] = 1e-3
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        """Both sides of every expert are held; in float64 they take twice the room."""
        wide = 2 if refines(self.tol) else 1
        work = Work(10 + 8 * wide, 4 * wide, "longer", each=3 * wide)
        return Needs(matrix=True, weights="not negative", work=work, factors="frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        tall = upright(deltas, layer)
        if tall is None:
            return no_update(deltas)
        M, stats = self._solved(tall, solving_dtype(deltas, self.tol))
        return LayerResult(tall.turned_back(M).mul_(self.scale).to(deltas.dtype), stats)

    def _solved(self, tall: Upright, dtype: torch.dtype) -> tuple[Tensor, dict[str, object]]:
        """M as `sum_t D_t` and what is added to it."""
        sides = [root_sides(D, tall.sizes, w, dtype) for D, w in zip(tall.experts, tall.weights, strict=True)]
        ridge = self.lam * sum(tall.weights)
        start = torch.zeros_like(tall.experts[0], dtype=dtype)
        for D, weight in zip(tall.experts, tall.weights, strict=True):
            start.add_(D, alpha=weight)
        B = torch.zeros_like(start)
        for D, one in zip(tall.experts, sides, strict=True):
            B += one.around(D - start)

        def applied(X: Tensor) -> Tensor:
            total = ridge * X
            for one in sides:
                total += one.around(X)
            return total

        rounding = 16 * torch.finfo(dtype).eps * sum(one.pull for one in sides)
        found = conjugate_gradients(applied, preconditioner(sides, ridge), B, self.steps, self.tol, rounding)
        status = "ok" if found.residual <= self.tol else "not converged"
        return start.add_(found.X), {"status": status, "steps": found.steps, "residual": found.residual}

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With all the steps that it may take."""
        m, n = max(rows, columns), min(rows, columns)
        formed = forms_sides(m, n, n)
        roots = m * n**2 + 9 * n**3 + 2 * m * n**2 + (m**2 * n + n**3 if formed else 0)
        product = 2 * m * n * (m + n) if formed else 4 * m * n**2 + 4 * n**3
        summed = 0 if formed else m**2 * n + n**3
        step = experts * product + 2 * m * n * (m + n)
        return experts * (roots + summed + product) + (m**3 + n**3) // 3 + self.steps * step
