"""mergekit's task arithmetic with its options, where it is not that of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import kth_largest_magnitude, magnitudes
from acemerge.methods.base import Layer, LayerResult, Needs, Scale
from acemerge.methods.chance import Chance
from acemerge.methods.elementwise import Blocks, row_blocks
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Bool, Float, Int, Tensor

Density = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Gamma = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

_NO_DIVISOR = 1e-8  # a sum of weights nearer to zero than this divides nothing
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergekitSum:
    """mergekit's task arithmetic with its options: trim, rescale, let signs vote, divide by the weights.

        D_t <- kept entries of D_t, times ||D_t||_1 / ||kept||_1 with `rescale`
        M    = sum over agreeing t of w_t D_t, divided by the sum of their w_t with `normalize`

    Agreeing are all, or with `vote` those whose w_t D_t has the sign of `sum_t w_t D_t`, plus where it is zero.
    `trim` says which entries are kept: `largest`, the `int(density n)` largest of the tensor; `random`, each with
    probability `density`; `middle`, as many, of those below the `gamma` largest; `by_rank`, each with a probability
    from `density - epsilon` for the smallest of its row to `density + epsilon` for the largest. Which of equal
    magnitudes stay is left to torch's sort, as it is there.

    Source: mergekit, `task_arithmetic`, `ties`, `dare_*`, `della*`, `breadcrumbs*`. Other than in our rules of those
    names, the divisor has the weights' signs, trimming is per tensor, and `rescale` restores the L1 norm where the
    papers divide by the probability. `density`, `gamma` and `epsilon` are one number, or one for each expert.
    `arithmetic` is the type of the whole computation. mergekit's is that of the models: rounding decides there which
    magnitudes are equal and which votes are even. float32 stands for the type that acemerge computes in.
    """

    name: ClassVar[str] = "mergekit_sum"
    source: ClassVar[str] = "mergekit 0.1.5"

    trim: Annotated[
        Literal["none", "largest", "random", "middle", "by_rank"], Field(description="which entries are kept")
    ] = "none"
    density: Annotated[Density | tuple[Density, ...], Field(description="share of the entries that is kept")] = 1.0
    gamma: Annotated[Gamma | tuple[Gamma, ...], Field(description="share of the largest, dropped")] = 0.01
    epsilon: Annotated[Epsilon | tuple[Epsilon, ...], Field(description="half the window of probabilities")] = 0.15
    vote: Annotated[bool, Field(description="only entries of the elected sign count")] = False
    normalize: Annotated[bool, Field(description="divide by the weights that count")] = False
    rescale: Annotated[bool, Field(description="restore the L1 norm after trimming")] = False
    arithmetic: Annotated[Literal["float32", "bfloat16", "float16"], Field(description="type that is computed in")] = (
        "float32"
    )
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        lengths = {len(value) for value in (self.density, self.gamma, self.epsilon) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise ValueError("density, gamma and epsilon must have one value for each expert")
        experts = max(lengths, default=1)
        for d, e in zip(_each(self.density, experts), _each(self.epsilon, experts), strict=True):
            if self.trim == "by_rank" and d < 1 and not 0 < d - e <= d + e < 1:
                raise ValueError("density - epsilon and density + epsilon must be between 0 and 1")

    @property
    def needs(self) -> Needs:
        lengths = [len(value) for value in (self.density, self.gamma, self.epsilon) if isinstance(value, tuple)]
        return Needs(experts=lengths[0] if lengths else None, work=self._work)

    @property
    def _work(self) -> Blocks:
        """In the sum, and before it where entries are chosen: where magnitudes are equal by sorting all of them."""
        copy, mask = 0.5 * (self.arithmetic != "float32"), 0.25 * (self.trim != "none")
        summing = Blocks(1.0, copy + mask, 2.0, 5.5 if self.vote else 1.0 + 4.0 * mask)
        if self.trim == "none":
            return summing
        return Blocks(2.5 if self.trim == "random" else 8.0, copy + mask, then=summing)

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        wanted = deltas.dtype
        deltas = deltas.to(_DTYPES.get(self.arithmetic, wanted))
        masks, factors = self._trimmed(deltas, layer)
        w = layer.weights.to(deltas.dtype).view(-1, *[1] * (deltas.ndim - 1))
        M = torch.empty_like(deltas[0])
        for rows in row_blocks(deltas):
            parts = deltas[:, rows]
            if masks is not None:
                parts = parts * masks[:, rows] * factors.view_as(w)
            M[rows] = self._sum(parts * w, w)
        return LayerResult(M.mul_(self.scale).to(wanted), LayerStats())

    def _sum(self, parts: Float[Tensor, "T *shape"], w: Float[Tensor, "T *ones"]) -> Float[Tensor, "*shape"]:
        """Their sum, or the mean of those that agree in sign."""
        divisor = w.sum(0)
        if self.vote:
            plus = parts.sum(0) >= -NULL * parts.abs().sum(0)  # rounding elects nobody
            elected = torch.where(plus, 1.0, -1.0).to(parts.dtype)
            agree = parts.sign() == elected
            parts, divisor = parts * agree, (w * agree).sum(0)
        total = parts.sum(0)
        if not self.normalize:
            return total
        return total / torch.where(divisor.abs() < _NO_DIVISOR, 1.0, divisor)

    def _trimmed(
        self, deltas: Float[Tensor, "T *shape"], layer: Layer
    ) -> tuple[Bool[Tensor, "T *shape"] | None, Float[Tensor, " T"]]:
        """Which entries are kept, None for all, and each expert's factor of the rescaling."""
        factors, T = torch.ones_like(layer.weights, dtype=deltas.dtype), len(deltas)
        if self.trim == "none":
            return None, factors
        chance = Chance(layer.seeds)
        masks = torch.ones(deltas.shape, dtype=torch.bool, device=deltas.device)
        for t, density in enumerate(_each(self.density, T)):
            if density >= 1:
                continue
            masks[t] = self._kept(deltas[t], t, density, chance)
            left = (deltas[t] * masks[t]).abs().sum()
            if self.rescale and left > 0:
                factors[t] = deltas[t].abs().sum() / left
        return masks, factors

    def _kept(self, D: Float[Tensor, "*shape"], t: int, density: float, chance: Chance) -> Bool[Tensor, "*shape"]:
        if density == 0:
            return torch.zeros_like(D, dtype=torch.bool)
        if self.trim == "random":
            return chance.uniform_like(D, t) < density
        if self.trim == "by_rank":
            return chance.uniform_like(D, t) < self._probabilities(D, t, density)
        n, size = D.numel(), magnitudes(D.flatten())
        if self.trim == "largest":
            return exactly_largest(size, max(1, int(density * n))).view_as(D)
        top = int(_at(self.gamma, t) * n)
        bottom = n - int(density * n) - top
        top, bottom = top + min(0, bottom), max(0, bottom)
        return middle(size, bottom, top).view_as(D)

    def _probabilities(self, D: Float[Tensor, "*shape"], t: int, density: float) -> Float[Tensor, "*shape"]:
        n, epsilon = D.shape[-1], _at(self.epsilon, t)
        ranks: Tensor = D.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(D.dtype)
        return density + 2 * epsilon * (ranks / max(1, n - 1) - 0.5 * (n > 1))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 20 * experts * rows * columns


def exactly_largest(size: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Exactly the k largest of non-negative numbers; which of equals, as torch's sort leaves them."""
    if k >= len(size):
        return torch.ones_like(size, dtype=torch.bool)
    mask = size >= kth_largest_magnitude(size, k) if k > 0 else torch.zeros_like(size, dtype=torch.bool)
    return mask if int(mask.sum()) == k else _chosen(size, size.argsort(descending=True)[:k])


def middle(size: Float[Tensor, " n"], bottom: int, top: int) -> Bool[Tensor, " n"]:
    """All but the so many smallest and the so many largest; which of equals, as torch's sort leaves them."""
    n = len(size)
    if bottom + top >= n:
        return torch.zeros_like(size, dtype=torch.bool)
    mask = (size >= kth_largest_magnitude(size, n - bottom)) & (size <= kth_largest_magnitude(size, top + 1))
    return mask if int(mask.sum()) == n - bottom - top else _chosen(size, size.argsort()[bottom : n - top])


def _chosen(size: Float[Tensor, " n"], places: Int[Tensor, " k"]) -> Bool[Tensor, " n"]:
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[places] = True
    return mask


def _each(value: float | tuple[float, ...], experts: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * experts


def _at(value: float | tuple[float, ...], t: int) -> float:
    return value[t] if isinstance(value, tuple) else value
