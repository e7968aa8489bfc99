"""The other rules that mergekit has otherwise than the papers. A mergekit recipe is turned into these.

The formulas are those of mergekit 0.1.5, found by running it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import magnitudes
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, no_update
from acemerge.methods.elementwise import Blocks
from acemerge.methods.mergekit_sum import exactly_largest
from acemerge.methods.sphere import WEIGHING, Weights
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_NO_DIVISOR = 1e-8  # a sum of weights nearer to zero than this divides nothing
_COLLINEAR = 1e-8  # an angle with a smaller sine is interpolated straight
_CHOOSING = Blocks(9.0, each=1.0)  # where magnitudes are equal all are sorted


@dataclass(frozen=True)
class MergekitLinear:
    """The sum of the weights themselves, `W = sum_t w_t W_t`: linear with `normalize: false`, scaled passthrough.

    Source: mergekit, `linear`. With weights that sum to 1 it is `average`.
    """

    name: ClassVar[str] = "mergekit_linear"
    source: ClassVar[str] = "mergekit 0.1.5"
    needs: ClassVar[Needs] = Needs(base=True, entrywise=True, moves_equals=True, work=Blocks(block=3.0, block_each=2.0))

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        models = Weights(deltas, torch.ones_like(layer.weights), layer.base)
        return LayerResult(models.update(layer.weights.tolist(), self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 4 * experts * rows * columns


@dataclass(frozen=True)
class MergekitSlerp:
    """Spherical interpolation at `t = w_2 / (w_1 + w_2)` of two experts' weights, or of their task vectors.

        X = sin((1 - t) a) / sin(a) X_1 + sin(t a) / sin(a) X_2,   a the angle between X_1 and X_2

    of the whole tensor, or of each row or column. `W = X` for weights, `M = X` for task vectors. Source: mergekit,
    `slerp` and `nuslerp`. Other than in our slerp `t` may be any number, a zero tensor is at a right angle to every
    other, and `straight` is a parameter: |cos a| above it is interpolated straight.
    One expert is kept whole.
    """

    name: ClassVar[str] = "mergekit_slerp"
    source: ClassVar[str] = "mergekit 0.1.5"
    needs: ClassVar[Needs] = Needs(base=True, most_experts=2, work=Blocks(6.0))

    of: Annotated[Literal["weights", "updates"], Field(description="what is interpolated")] = "weights"
    along: Annotated[Literal["tensor", "rows", "columns"], Field(description="what is one vector")] = "tensor"
    straight: Annotated[float, Field(gt=0, le=1, description="cosine above which it is a straight line")] = 0.9995
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        if len(deltas) == 1:
            return LayerResult(deltas[0] * self.scale, LayerStats((Status.ONE_EXPERT,)))
        base = layer.base if self.of == "weights" and layer.base is not None else torch.zeros_like(deltas[0])
        X, Y = deltas[0] + base, deltas[1] + base
        dims = list(range(X.ndim)) if self.along == "tensor" else [-1 if self.along == "rows" or X.ndim < 2 else -2]
        w1, w2 = layer.weights.tolist()
        t = w2 / (w1 + w2) if abs(w1 + w2) >= _NO_DIVISOR else 0.5
        p, q = self._shares(X, Y, dims, t)
        M = X.mul_(p.to(X.dtype)).add_(Y.mul_(q.to(X.dtype))).sub_(base)
        return LayerResult(M.mul_(self.scale), LayerStats(t=t))

    def _shares(
        self, X: Float[Tensor, "*shape"], Y: Float[Tensor, "*shape"], dims: list[int], t: float
    ) -> tuple[Float[Tensor, "*ones"], Float[Tensor, "*ones"]]:
        """The factors of X and Y, float64, one for each vector."""
        dot = (X * Y).sum(dims, keepdim=True, dtype=torch.float64)
        norms = [Z.square().sum(dims, keepdim=True, dtype=torch.float64).sqrt() for Z in (X, Y)]
        cosine = (dot / (norms[0].clamp_min(_COLLINEAR) * norms[1].clamp_min(_COLLINEAR))).clamp(-1, 1)
        angle = cosine.arccos()
        sine = angle.sin()
        straight = (cosine.abs() > self.straight) | (sine.abs() < _COLLINEAR)
        safe = torch.where(straight, 1.0, sine)
        p = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
        return p, torch.where(straight, t, (t * angle).sin() / safe)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 12 * rows * columns


@dataclass(frozen=True)
class MergekitMultislerp:
    """Multi-SLERP: the mean direction of the experts' weights, or of their task vectors, at their mean length.

        u = sum_t w_t X_t / (||X_t|| + eps)
        X = (sum_t w_t ||X_t||) u / ||u||

    with the weights divided by their sum where `normalize`. `W = X` for weights, `M = X` for task vectors. Source:
    mergekit, `multislerp`. Its step from u in the tangent space there is zero: the directions' mean has no part
    at a right angle to itself. Where they cancel, the weighted sum is left; mergekit refuses that for more than two.
    One expert is kept whole.
    """

    name: ClassVar[str] = "mergekit_multislerp"
    source: ClassVar[str] = "mergekit 0.1.5"
    needs: ClassVar[Needs] = Needs(base=True, work=WEIGHING)

    of: Annotated[Literal["weights", "updates"], Field(description="what is interpolated")] = "weights"
    normalize: Annotated[bool, Field(description="divide the weights by their sum")] = True
    eps: Annotated[float, Field(gt=0, le=1, description="a length below it counts as none")] = 1e-8
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        if len(deltas) == 1:
            return LayerResult(deltas[0] * self.scale, LayerStats((Status.ONE_EXPERT,)))
        base = layer.base if self.of == "weights" else None
        models = Weights(deltas, torch.ones_like(layer.weights), base)
        gram = models.gram()
        norms, w = gram.diagonal().clamp_min(0).sqrt(), layer.weights
        if self.normalize and abs(w.sum()) >= _NO_DIVISOR:
            w = w / w.sum()
        u = w / (norms + self.eps)
        length = float((u @ gram @ u).clamp_min(0).sqrt())
        cancels = length < max(self.eps, NULL * float(w.abs().sum()))
        shares = w if cancels else u * (float((w * norms).sum()) / length)
        status = Status.CANCELLED if cancels else Status.OK
        return LayerResult(models.update(shares.tolist(), self.scale), LayerStats((status,)))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return experts * (experts + 3) * rows * columns


@dataclass(frozen=True)
class MergekitSce:
    """SCE: keep the entries in which the experts differ most, weigh each expert by its energy, let signs vote.

        D_t <- D_t where the variance over t is among the top `select` of those that are not 0, else 0
        w_t  = ||D_t||^2 / sum_s ||D_s||^2
        M    = sum over agreeing t of w_t D_t / sum of their w_t

    Agreeing are those with the sign of `sum_t D_t`, plus where it is zero. Source: Wan et al. 2024 (arXiv
    2408.07990), in mergekit's form, whose `select_topk` is our `select`. A recipe's
    weights multiply the task vectors first; mergekit has none.
    """

    name: ClassVar[str] = "mergekit_sce"
    source: ClassVar[str] = "arXiv 2408.07990"

    select: Annotated[float, Field(ge=0, le=1, description="share of the entries that differ, kept")] = 1.0
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(work=Blocks(4.5, 3.25, then=_CHOOSING) if self.select < 1 else Blocks(3.5, 3.25))

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        deltas = deltas * layer.weights.to(deltas.dtype).view(-1, *[1] * (deltas.ndim - 1))
        if self.select < 1:
            spread = deltas.var(0, unbiased=False)
            chosen = exactly_largest(magnitudes(spread).flatten(), int(self.select * int(spread.count_nonzero())))
            deltas = deltas * chosen.view_as(spread)
        n = energies(deltas)
        if n.sum() == 0:
            return no_update(deltas)
        w = (n / n.sum()).to(deltas.dtype).view(-1, *[1] * (deltas.ndim - 1))
        plus = deltas.sum(0) >= -NULL * deltas.abs().sum(0)  # rounding elects nobody
        agree = deltas.sign() == torch.where(plus, 1.0, -1.0).to(deltas.dtype)
        divisor = (w * agree).sum(0)
        M = (deltas * agree * w).sum(0) / torch.where(divisor.abs() < 1e-6, 1.0, divisor)
        return LayerResult(M.mul_(self.scale), LayerStats(weights=tuple(w.flatten().tolist())))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 10 * experts * rows * columns
