"""Merging updates of low rank without forming them: a rule is shown the small cores of the updates.

All `D_t = U_t V_t` live between the span of the stacked U_t and that of the stacked V_t. With orthonormal bases of
both, `D_t = Q_U C_t Q_V^T`, and a rule that commutes with rotations of inputs and outputs makes `M = Q_U C Q_V^T`,
C what it makes of the cores, if outside the bases it adds nothing. That is so where M = (sum_t D_t G_t) A^(-1):
`G_t = D_t^T D_t` is zero outside, a ridge is a multiple of I there, and the numerator ends it. What depends on the
size of the layer (a truncation that is a share of it, a mean over min(out, in) singular values, a mean diagonal)
comes from the frame; singular values outside are zeros.

ace does not commute with rotations, for 1 is a special direction on both sides. The bases hold it: with
`e = Q_U^T 1` and `g = Q_V^T 1`, `1 mu_t^T = Q_U (e e^T C_t / out) Q_V^T` and
`1 c^T = Q_V (g (f / in) g^T sum_t S_t) Q_V^T`, so that centring and prior stay in the cores, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from acemerge.errors import UsageError
from acemerge.linalg.gram import energies
from acemerge.linalg.lowrank import (
    Cores,
    LowRank,
    best_factors,
    both_sides,
    left_side,
    share_row_space,
    truncated_factors,
)
from acemerge.methods.base import Layer, Method, Needs
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class LowRankResult:
    """What a rule made of updates of low rank.

    The merged update, the rule's scale in it, is `left right`, (out, k) and (k, in); where the rule had to form it,
    it is `left` (out, in) and `right` is None. `stats` are the rule's.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"] | None
    stats: LayerStats

    def delta(self) -> Float[Tensor, "out in"]:
        """The merged update itself: the merged weight is `W_0 + delta`."""
        return self.left if self.right is None else self.left @ self.right

    @property
    def energy(self) -> float:
        """`||delta||_F^2`."""
        if self.right is None:
            return float(energies(self.left[None]))
        return float(LowRank((self.left,), (self.right,)).energies())

    def added_to(self, W0: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """`W_0 + delta`, in place, the update not formed where there are factors."""
        return W0.add_(self.left) if self.right is None else W0.addmm_(self.left, self.right)

    def truncated(self, rank: int) -> LowRankResult:
        """The nearest update of at most this rank, its factors of equal size; `stats.energy_lost` is the share of
        `||delta||_F^2` that it lacks. UsageError where `rank` is not positive.
        """
        if rank < 1:
            raise UsageError("rank", f"{rank} is no rank", "give 1 or more")
        left, right, lost = nearest_factors(self, rank)
        return LowRankResult(left, right, replace(self.stats, energy_lost=lost))

    def transposed(self) -> LowRankResult:
        """The same for the transposed layer."""
        if self.right is None:
            return LowRankResult(self.left.T, None, self.stats)
        return LowRankResult(self.right.T, self.left.T, self.stats)


def nearest_factors(update: LowRankResult, rank: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"], float]:
    """The two factors, of equal size, of the nearest update of at most this rank, and the share of the energy that it
    lacks.
    """
    if update.right is None:
        return best_factors(update.left, rank)
    return truncated_factors(update.left, update.right, rank)


def keeps_low_rank(needs: Needs, rank: int, shape: tuple[int, int]) -> bool:
    """Whether a rule merges updates (out, in), of `rank` all together, without forming them: where that is cheaper."""
    if needs.factors in ("linear", "full"):
        return needs.factors == "linear"
    return rank + 1 < (shape[0] if needs.factors == "left frame" else max(shape))


def merge_low_rank(method: Method, updates: LowRank, layer: Layer, dtype: torch.dtype) -> LowRankResult:
    """Merge the updates by a rule, as it says in `needs.factors`; the result is in `dtype`.

    Where all experts with an update have one row space, as of a frozen A in LoRA, and not one column space too, a rule
    that estimates from the input side merges the transposes: `stats.shared_input_side` and `stats.side` say so.
    """
    if not method.needs.input_side:
        return _merge(method, updates, layer, dtype)
    active = [t for t, w in enumerate(layer.weights.tolist()) if w and updates.left[t].any() and updates.right[t].any()]
    shared = share_row_space(tuple(updates.right[t] for t in active))
    turn = shared and not share_row_space(tuple(updates.left[t].T for t in active))
    merged = (
        _merge(method, updates.transposed(), layer, dtype).transposed()
        if turn
        else _merge(method, updates, layer, dtype)
    )
    stats = replace(merged.stats, shared_input_side=shared, side="output" if turn else "input")
    return replace(merged, stats=stats)


def _merge(method: Method, updates: LowRank, layer: Layer, dtype: torch.dtype) -> LowRankResult:
    factors = method.needs.factors
    if factors == "linear":
        return _combined(method, updates, layer, dtype)
    if keeps_low_rank(method.needs, updates.rank, updates.shape):
        return _lifted(method, left_side(updates) if factors == "left frame" else both_sides(updates), layer, dtype)
    result = method.merge(updates.full(dtype), layer)
    before = tuple(status for status in result.stats.statuses if status is not Status.OK)
    return LowRankResult(result.delta, None, replace(result.stats, statuses=(*before, Status.FULL_UPDATES)))


def _combined(method: Method, updates: LowRank, layer: Layer, dtype: torch.dtype) -> LowRankResult:
    """The factors side by side: what a linear rule makes of unit vectors are its coefficients."""
    units = torch.eye(len(updates.left), dtype=torch.float64, device=layer.weights.device)
    result = method.merge(units, layer)
    left = torch.cat([c * U.to(dtype) for c, U in zip(result.delta.tolist(), updates.left, strict=True)], 1)
    return LowRankResult(left, torch.cat([V.to(dtype) for V in updates.right]), result.stats)


def _lifted(method: Method, cores: Cores, layer: Layer, dtype: torch.dtype) -> LowRankResult:
    """The rule on the cores, in float64, which costs nothing at their size."""
    result = method.merge(cores.values, replace(layer, frame=cores.frame))
    left, right = cores.lifted(result.delta)
    return LowRankResult(left.to(dtype), right.to(dtype), result.stats)
