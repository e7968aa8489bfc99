"""Rules whose masks compare each expert with all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.rounding import NULL
from acemerge.methods.base import Layer, LayerResult, Needs, Scale
from acemerge.methods.elementwise import Blocks, row_blocks
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_VOTES = 2


@dataclass(frozen=True)
class Consensus:
    """Consensus task arithmetic: keep the entries that at least two experts want, then sum.

        wanted_t = |D_t| > lam |sum_s D_s - D_t|
        M        = sum_t D_t where at least two experts want the entry, else 0

    Source: Wang et al. 2024, TALL masks (arXiv 2405.07813). `lam` is tuned in 0.2..0.6 there. Departure: one
    expert alone needs one vote. What beats the others by rounding alone does not beat them.
    """

    name: ClassVar[str] = "consensus"
    source: ClassVar[str] = "arXiv 2405.07813"
    needs: ClassVar[Needs] = Needs(entrywise=True, work=Blocks(block=4.0, block_each=2.0))

    lam: Annotated[float, Field(ge=0, allow_inf_nan=False, description="how much of the others an entry must beat")] = (
        0.4
    )
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        votes_needed = min(_VOTES, len(deltas))
        M, weights = torch.empty_like(deltas[0]), layer.weights.tolist()
        for rows in row_blocks(deltas):
            parts = [D[rows] * weight for D, weight in zip(deltas, weights, strict=True)]
            sums = torch.stack(parts).sum(0)
            votes = torch.zeros_like(sums)
            for part in parts:
                votes += part.abs() > self.lam * (1 + NULL) * (sums - part).abs()
            M[rows] = sums * (votes >= votes_needed) * self.scale
        return LayerResult(M, LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 7 * experts * rows * columns


@dataclass(frozen=True)
class Emr:
    """EMR: elect one unified update, and keep for each expert a mask and a scale that give its own back.

        M        = sign(sum_t D_t) max_t |D_t|, the maximum over the experts that have this sign
        mask_t   = D_t M > 0
        lambda_t = sum |D_t| / sum |mask_t M|, over all tensors, with the sign of the weight
        W_t     ~= W_0 + lambda_t mask_t M

    Source: Huang et al. 2024, EMR-Merging (arXiv 2405.17461). The merged model holds M; masks and scales are
    written beside it, see `acemerge.expert_weights`. Weights and `scale` are not the paper's: a weight multiplies its
    D_t in M and in the mask, `scale` multiplies M alone, and the expert that is given back is D_t itself, whatever
    they are. Departures from the authors' code: lambda_t is of all entries alike, as in the paper, where the code adds
    up means of each tensor; a sum that is zero but for rounding has no sign, where the code takes minus.
    """

    name: ClassVar[str] = "emr"
    source: ClassVar[str] = "arXiv 2405.17461"
    needs: ClassVar[Needs] = Needs(masks=True, work=Blocks(each=0.25, block=3.0, block_each=5.0))

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        M, weights = torch.empty_like(deltas[0]), layer.weights.tolist()
        masks = torch.empty(deltas.shape, dtype=torch.bool, device=deltas.device)
        own, kept = (torch.zeros(len(deltas), dtype=torch.float64, device=deltas.device) for _ in range(2))
        for rows in row_blocks(deltas):
            parts = torch.stack([D[rows] * weight for D, weight in zip(deltas, weights, strict=True)])
            sums = parts.sum(0)
            sign = sums.sign() * (sums.abs() > NULL * parts.abs().sum(0))
            unified = (parts * sign).amax(0).clamp(min=0) * sign
            masks[:, rows] = parts * unified > 0
            flat = (masks[:, rows] * unified.abs()).flatten(1)
            own += parts.abs().flatten(1).sum(1, dtype=torch.float64)
            kept += flat.sum(1, dtype=torch.float64) * self.scale
            M[rows] = unified * self.scale
        own = torch.where(layer.weights == 0, 0, own / layer.weights)
        stats = LayerStats(own_l1=tuple(own.tolist()), masked_l1=tuple(kept.tolist()))
        return LayerResult(M, stats, masks)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 8 * experts * rows * columns
