"""mergekit's rules of single entries: swap what is near, average what overlaps.

The formulas are those of mergekit 0.1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.methods.base import Layer, LayerResult, Needs, Scale
from acemerge.methods.elementwise import Blocks
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_NEAREST = 1e-6  # a smaller difference counts as this one


@dataclass(frozen=True)
class MergekitNearswap:
    """NearSwap: take one expert's entries where they are near to the base's, and go at most `t` towards them elsewhere.

        M = min(1, t / max(|D|, 1e-6)) D

    Source: alchemonaut, QuartetAnemoi-70B; in mergekit's form, `nearswap`. A weight multiplies the task vector.
    """

    name: ClassVar[str] = "mergekit_nearswap"
    source: ClassVar[str] = "mergekit 0.1.5"
    needs: ClassVar[Needs] = Needs(most_experts=1, entrywise=True, work=Blocks(4.0))

    t: Annotated[float, Field(ge=0, allow_inf_nan=False, description="difference up to which entries are swapped")] = (
        1e-4
    )
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        D = deltas[0] * layer.weights[0].to(deltas.dtype)
        share = (self.t / D.abs().clamp_min(_NEAREST)).clamp_max(1.0)
        return LayerResult(D.mul_(share).mul_(self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 6 * rows * columns


@dataclass(frozen=True)
class MergekitRam:
    """RAM: the mean of those that changed an entry; what one of them changed alone is kept whole, or strengthened.

        c    = #{t: |D_t| > epsilon}, by entries
        M    = sum over |D_t| > epsilon of D_t / c where c > 1, of l_t D_t where c = 1
        l_t  = 1 + r min(alpha, shared_t / own_t),   the numbers of entries that t changed with others, and alone

    Source: arXiv 2601.13572, in mergekit's form: `ram`, where r is 0, and `ramplus_tl`, which counts within each
    tensor. A recipe's weights multiply the task vectors first; mergekit has none.
    """

    name: ClassVar[str] = "mergekit_ram"
    source: ClassVar[str] = "arXiv 2601.13572"
    needs: ClassVar[Needs] = Needs(work=Blocks(4.0, each=4.5))

    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False, description="magnitude above which it was changed")] = (
        1e-5
    )
    r: Annotated[float, Field(allow_inf_nan=False, description="strengthening of what one changed alone")] = 0.0
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False, description="most of shared to own that counts")] = 0.2
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        ones = [1] * (deltas.ndim - 1)
        deltas = deltas * layer.weights.to(deltas.dtype).view(-1, *ones)
        changed = deltas.abs() > self.epsilon
        count = changed.sum(0)
        alone = changed & (count == 1)
        own = alone.flatten(1).sum(1).double()
        shared = changed.flatten(1).sum(1) - own
        ratio = shared / own.clamp_min(self.epsilon) if self.epsilon else torch.nan_to_num(shared / own, posinf=1e300)
        strength = 1 + self.r * ratio.clamp(0, self.alpha)
        factors = torch.where(alone, strength.to(deltas.dtype).view(-1, *ones), 1 / count.clamp_min(1).to(deltas.dtype))
        M = (deltas * changed).mul_(factors).sum(0)
        return LayerResult(M.mul_(self.scale), LayerStats(own={"strengths": strength.tolist()}))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 8 * experts * rows * columns
