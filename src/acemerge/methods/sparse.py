"""Sparse rules: drop entries of the task vectors, then sum them or let their signs vote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import at_least, at_most, kth_largest_magnitude, magnitudes, share_of
from acemerge.methods.base import Layer, LayerResult, Needs, Scale
from acemerge.methods.chance import Chance
from acemerge.methods.election import ELECTING, SUMMING, Sparse, elected_mean, elected_means, total
from acemerge.methods.elementwise import RANKING
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Ties:
    """TIES: trim small entries, elect a sign for every entry, average those that agree with it.

        D_t <- D_t where |D_t| is among the top `keep` of all entries, else 0
        sign = sign(sum_t w_t D_t), the tensor's majority sign where the sum is zero
        M    = mean of the non-zero w_t D_t that have this sign

    Source: Yadav et al. 2023 (arXiv 2306.01708). The share is taken over all tensors that this rule merges,
    or over one tensor with `trim: tensor`, the common shortcut. Departure: the majority sign is the tensor's,
    not the whole model's. Magnitudes are ranked in float32 and entries equal to the last one kept, to rounding (2^-21),
    stay; a sum of less than that share of its terms' magnitudes is zero.
    """

    name: ClassVar[str] = "ties"
    source: ClassVar[str] = "arXiv 2306.01708"

    keep: Annotated[Share, Field(description="share of the entries that is kept")] = 0.2
    trim: Annotated[
        Literal["global", "tensor"], Field(description="the share of the whole model's entries or of each tensor's")
    ] = "global"
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        work = replace(ELECTING, then=RANKING)
        return Needs(keep=self.keep if self.trim == "global" else None, work=work)

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        thresholds = self._thresholds(deltas, layer)
        weights: list[float] = layer.weights.tolist()

        def trimmed(t: int, rows: slice) -> Tensor:
            D = deltas[t, rows]
            return D * at_least(magnitudes(D), thresholds[t]) * weights[t]

        merged = elected_mean(deltas, layer.weights, trimmed, self.scale)
        return LayerResult(merged, LayerStats(thresholds=tuple(thresholds)))

    def merge_together(self, stack: Float[Tensor, "P T *shape"], layers: Sequence[Layer]) -> list[LayerResult]:
        thresholds = [self._thresholds(D, layer) for D, layer in zip(stack, layers, strict=True)]
        shape = (-1, stack.shape[1], *[1] * (stack.ndim - 2))
        kept = at_least(magnitudes(stack), torch.tensor(thresholds, dtype=torch.float32).to(stack.device).view(shape))
        weights = torch.stack([layer.weights for layer in layers]).to(stack.dtype).view(shape)
        merged = elected_means(stack * kept * weights, self.scale)
        about = (LayerStats(thresholds=tuple(found)) for found in thresholds)
        return [LayerResult(M, stats) for M, stats in zip(merged, about, strict=True)]

    def _thresholds(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> list[float]:
        """Of the whole model, or of this tensor."""
        return list(layer.thresholds or [threshold(D, self.keep) for D in deltas])

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 8 * experts * rows * columns


@dataclass(frozen=True)
class DareLinear:
    """DARE, then the sum: drop each entry with probability `p`, divide the others by `1 - p`.

        M = sum_t w_t D_t * mask_t / (1 - p),   mask_t = 1 with probability 1 - p

    Source: Yu et al. 2023 (arXiv 2311.03099). The mask depends on the recipe's seed, the tensor's name and the
    expert's place alone.
    """

    name: ClassVar[str] = "dare_linear"
    source: ClassVar[str] = "arXiv 2311.03099"
    needs: ClassVar[Needs] = Needs(work=SUMMING)

    p: Annotated[float, Field(ge=0, lt=1, description="probability that an entry is dropped")] = 0.5
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        return LayerResult(total(deltas, _dropped(deltas, layer, self.p), self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 4 * experts * rows * columns


@dataclass(frozen=True)
class DareTies:
    """DARE, then the election of TIES without its trim: the mean of the surviving entries that agree in sign.

    Source: Yu et al. 2023 (arXiv 2311.03099).
    """

    name: ClassVar[str] = "dare_ties"
    source: ClassVar[str] = "arXiv 2311.03099"
    needs: ClassVar[Needs] = Needs(work=ELECTING)

    p: Annotated[float, Field(ge=0, lt=1, description="probability that an entry is dropped")] = 0.5
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        merged = elected_mean(deltas, layer.weights, _dropped(deltas, layer, self.p), self.scale)
        return LayerResult(merged, LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 8 * experts * rows * columns


@dataclass(frozen=True)
class Della:
    """DELLA: large entries of a row survive more often than small ones, then the election of TIES.

        q_i = density + eps (rank_i / (n - 1) - 1/2),   rank 0 for the row's smallest magnitude of n
        D_i <- D_i / q_i with probability q_i, else 0

    Source: Deep et al. 2024 (arXiv 2406.11617). A row is the last dimension; a vector is one row. Entries that are
    equal to rounding share their mean rank.
    """

    name: ClassVar[str] = "della"
    source: ClassVar[str] = "arXiv 2406.11617"
    needs: ClassVar[Needs] = Needs(work=replace(ELECTING, block=14.0))

    density: Annotated[Share, Field(description="mean probability that an entry is kept")] = 0.5
    eps: Annotated[float, Field(ge=0, lt=1, description="width of the window of probabilities")] = 0.1
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density - self.eps / 2 <= self.density + self.eps / 2 <= 1:
            raise ValueError("density - eps/2 and density + eps/2 must be probabilities above 0")

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        if deltas.ndim == 2:
            row = self.merge(deltas[:, None], layer)
            return LayerResult(row.delta[0], row.stats)
        chance = Chance(layer.seeds)
        weights: list[float] = layer.weights.tolist()

        def sampled(t: int, rows: slice) -> Tensor:
            D = deltas[t, rows]
            q = self._probabilities(D)
            return D * (chance.uniform_like(D, t) < q) * (weights[t] / q)

        return LayerResult(elected_mean(deltas, layer.weights, sampled, self.scale), LayerStats())

    def _probabilities(self, D: Float[Tensor, "rows *rest"]) -> Float[Tensor, "rows *rest"]:
        n = D.shape[-1]
        size = D.abs().contiguous()
        ordered = size.sort(dim=-1).values
        below = torch.searchsorted(ordered, size * (1 - NULL))
        up_to = torch.searchsorted(ordered, size * (1 + NULL), right=True)
        ranks = ((below + up_to - 1) / 2).to(D.dtype)
        return self.density + self.eps * (ranks / max(1, n - 1) - 0.5 * (n > 1))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 20 * experts * rows * columns


@dataclass(frozen=True)
class Breadcrumbs:
    """Model Breadcrumbs: drop the largest and the smallest entries of each tensor, then sum.

        M = sum_t w_t D_t where |D_t| is not among the top `gamma` and among the top `gamma + density`

    Source: Davari and Belilovsky 2023 (arXiv 2312.06795). Entries equal to the outermost one kept, to
    rounding (2^-21), stay.
    """

    name: ClassVar[str] = "breadcrumbs"
    source: ClassVar[str] = "arXiv 2312.06795"
    needs: ClassVar[Needs] = Needs(work=replace(SUMMING, block=4.0, then=RANKING))

    density: Annotated[Share, Field(description="share of the entries that is kept")] = 0.9
    gamma: Annotated[float, Field(ge=0, lt=1, description="share of the largest entries, dropped")] = 0.01
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        if self.density + self.gamma > 1:
            raise ValueError("density and gamma together must be at most 1")

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        n = deltas[0].numel()
        weights: list[float] = layer.weights.tolist()
        largest = min(int(self.gamma * n), n - 1)
        last = min(n, largest + share_of(self.density, n))
        bounds = [(kth_largest_magnitude(D, last), kth_largest_magnitude(D, largest + 1)) for D in deltas]

        def middle(t: int, rows: slice) -> Tensor:
            D = deltas[t, rows]
            size = magnitudes(D)
            return D * (at_least(size, bounds[t][0]) & at_most(size, bounds[t][1])) * weights[t]

        return LayerResult(total(deltas, middle, self.scale), LayerStats())

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 8 * experts * rows * columns


def threshold(D: Float[Tensor, "*shape"], keep: float) -> float:
    """The smallest magnitude among the top `keep` of the entries."""
    return kth_largest_magnitude(D, share_of(keep, D.numel()))


def _dropped(deltas: Float[Tensor, "T *shape"], layer: Layer, p: float) -> Sparse:
    chance = Chance(layer.seeds)
    factors: list[float] = (layer.weights / (1 - p)).tolist()

    def dropped(t: int, rows: slice) -> Tensor:
        D = deltas[t, rows]
        return D * (chance.uniform_like(D, t) >= p) * factors[t]

    return dropped
