"""Least squares weighted on both sides, with nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.two_sided import conjugate_gradients, dot, solving_dtype
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.both_sides import Upright, operations, reached, system, upright
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_USUAL = 4  # steps to the default tol: three or four on text8's layers
_DAMPING = 0.1  # of the mean eigenvalue of the pooled moments: what all have little of is left alone


@dataclass(frozen=True)
class KronAuto:
    """Least squares on both sides, pulled to no update as the pooled moments say, then scaled by how far the experts
    agree.

        X minimises  sum_t ||A_t^(1/2) (X - D_t) S_t^(1/2)||_F^2 + lam ||L^(1/2) X R^(1/2)||_F^2
        sum_t A_t X S_t + lam L X R = B = sum_t A_t D_t S_t
        A_t = (D_t D_t^T)^(1/2),  S_t = (D_t^T D_t)^(1/2),  each over its mean eigenvalue, all eigenvalues beyond the
              k largest at their mean, k = max(64, int(keep min(out, in)))
        L = sum_t A_t / T^(1/2) + 0.1 T^(1/2) I,  R = sum_t S_t / T^(1/2) + 0.1 T^(1/2) I
        M = (b / h) (b^2 / (h n)) X,  b = <X, B>,  h = sum_t <X, A_t X S_t>,  n = sum_t <D_t, A_t D_t S_t>

    Source: this library. The weights are those of `kron`. The pull is that of one more task that wants no update and
    has the moments of all together: weak where one expert alone has its energy, strong where several meet. b / h is
    the factor on X that fits best, and `agreement`, b^2 / (h n), the squared cosine between what is merged and what
    the experts want, under their weights: 1 where nobody is disturbed. By conjugate gradients, until the residual is
    `tol` of the right-hand side, or for `steps` steps: then `status` is "not converged", and `residual` how far it
    came; "float64" says that float32 would not do, as for updates of low rank. Scaling all updates scales M. Experts
    without an update drop out of T; one alone gives itself, and experts that share no input direction or no output
    direction are kept up to what the pull takes where they are faint. A weight multiplies an expert's terms and its
    share of L, R and T, and may not be negative: a weight of 2 is the expert twice.
    """

    name: ClassVar[str] = "kron_auto"
    source: ClassVar[str] = "acemerge"

    lam: Annotated[float, Field(gt=0, allow_inf_nan=False, description="pull to no update")] = 1.0
    keep: Annotated[float, Field(ge=0, le=1, description="share of the directions that are told apart")] = 0.25
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of conjugate gradients, at most")] = 30
    tol: Annotated[float, Field(gt=0, lt=1, description="residual to reach, as a share of the right-hand side")] = 1e-2
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        work = Workspace(24, 8, "longer", each=4)
        return Needs(matrix=True, weights="not negative", work=work, factors="frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        tall = upright(deltas, layer)
        if tall is None:
            return no_update(deltas)
        if len(tall.experts) == 1:
            M, stats = tall.experts[0].clone(), LayerStats(steps=0, residual=0.0, agreement=1.0)
        else:
            M, stats = self._solved(tall, solving_dtype(deltas, self.tol))
        return LayerResult(tall.turned_back(M).mul_(self.scale).to(deltas.dtype), stats)

    def _solved(self, tall: Upright, asked: torch.dtype) -> tuple[Tensor, LayerStats]:
        given = system(tall, self.keep, self.keep, _DAMPING, asked)
        found = conjugate_gradients(
            given.applied, given.pooled, given.B, self.steps, self.tol, given.rounding, self.lam
        )
        b = dot(found.X, given.B)
        h = b - self.lam * found.pulled  # where conjugate gradients are, <X, H X + lam P X> = <X, B>
        agreement = min(1.0, b * b / (h * given.wanted)) if h > 0 else 0.0
        status = reached(found.residual <= self.tol, in_float64=given.B.dtype != asked)
        stats = LayerStats((status,), steps=found.steps, residual=found.residual, agreement=agreement)
        return found.X.mul_(given.size * b / h * agreement if agreement else 0.0), stats

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With the steps that it usually takes."""
        return operations(experts, rows, columns, self.keep, self.keep, min(self.steps, _USUAL))
