"""Least squares weighted on both sides, with nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.two_sided import conjugate_gradients, dot, solving_dtype
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, no_update
from acemerge.methods.both_sides import KeptWork, Upright, operations, reached, system, upright
from acemerge.methods.stats import LayerStats
from acemerge.methods.trust import STEP, Step, disturbance, shortening
from acemerge.shapes import Float, Tensor

_USUAL = 3  # steps to the default tol: three or four on text8's layers, two where updates are noise
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
        N = (b / h) (b^2 / (h n)) X,  b = <X, B>,  h = sum_t <X, A_t X S_t>,  n = sum_t <D_t, A_t D_t S_t>
        M = N / (1 + q ||N||_F^2 / (step^2 w^2))^(1/2)

    Source: this library. The weights are those of `kron`. The pull is that of one more task that wants no update and
    has the moments of all together: weak where one expert alone has its energy, strong where several meet. b / h is the
    factor on X that fits best, and `agreement`, b^2 / (h n), the squared cosine between what is merged and what the
    experts want, under their weights: 1 where nobody is disturbed. By conjugate gradients, until the residual is `tol`
    of the right-hand side, or for `steps` steps: then `status` is "not converged", and `residual` how far it came;
    "float64" says that float32 would not do, as for updates of low rank. Experts without an update drop out of T; one
    alone gives itself, and in N experts that share no input direction or no output direction are kept up to what the
    pull takes where they are faint. A weight multiplies an expert's terms and its share of L, R and T, and may not be
    negative: a weight of 2 is the expert twice.

    The base tells how far the fit holds, which is of first order in the weights; q, how far apart the experts are, and
    w^2, the energy of the layer's weights, as in `trust`. M is shorter than N where that would move the weights by more
    than `step` of themselves, and where an expert has moved them so far, with `r = q ||D_t||_F^2 / w^2`, of its A_t and
    S_t the share `r^2 / (r^2 + step^4)` is I: what it says of its inputs and outputs no longer holds. Scaling base and
    updates together scales M. Where the base is not known, as by `merge_deltas` without `base`, M is N and no share
    is I. `relative_step` is `||N||_F / w`.
    """

    name: ClassVar[str] = "kron_auto"
    source: ClassVar[str] = "acemerge"

    lam: Annotated[float, Field(gt=0, allow_inf_nan=False, description="pull to no update")] = 1.0
    keep: Annotated[float, Field(ge=0, le=1, description="share of the directions that are told apart")] = 0.25
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of conjugate gradients, at most")] = 30
    tol: Annotated[float, Field(gt=0, lt=1, description="residual to reach, as a share of the right-hand side")] = 1e-2
    step: Step = STEP
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        work = KeptWork(self.keep, self.keep, 10)
        return Needs(matrix=True, base_energy=True, weights="not negative", work=work, factors="frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        tall = upright(deltas, layer)
        if tall is None:
            return no_update(deltas)
        if len(tall.experts) == 1:
            M, stats = tall.experts[0].clone(), LayerStats(steps=0, residual=0.0, agreement=1.0)
        else:
            M, stats = self._solved(tall, solving_dtype(deltas, self.tol), layer.energy_of_base())
        return LayerResult(tall.turned_back(M).mul_(self.scale).to(deltas.dtype), stats)

    def _solved(self, tall: Upright, asked: torch.dtype, base_energy: float | None) -> tuple[Tensor, LayerStats]:
        known, even = None, None
        if base_energy is not None:
            n = [float(energies(D[None])) for D in tall.experts]
            known = disturbance(tall.experts, tall.weights, n, base_energy)
            even = [self._even(known.moved(own)) for own in n]
        given = system(tall, self.keep, self.keep, _DAMPING, asked, even=even)
        found = conjugate_gradients(
            given.applied, given.pooled, given.B, self.steps, self.tol, given.rounding, self.lam
        )
        b = dot(found.X, given.B)
        h = b - self.lam * found.pulled  # where conjugate gradients are, <X, H X + lam P X> = <X, B>
        agreement = min(1.0, b * b / (h * given.wanted)) if h > 0 else 0.0
        status = reached(found.residual <= self.tol, in_float64=given.B.dtype != asked)
        stats = LayerStats((status,), steps=found.steps, residual=found.residual, agreement=agreement)
        N = found.X.mul_(given.size * b / h * agreement if agreement else 0.0)
        if known is None:
            return N, stats
        energy = float(energies(N[None]))
        return N.mul_(shortening(known.moved(energy), self.step)), replace(stats, relative_step=known.step(energy))

    def _even(self, moved: float) -> float:
        """The share of an expert's moments that is I."""
        far = moved / self.step / self.step  # which a power would take beyond float64
        return 1 - 1 / (1 + far * far)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With the steps that it usually takes."""
        return operations(experts, rows, columns, self.keep, self.keep, min(self.steps, _USUAL))
