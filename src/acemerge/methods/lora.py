"""Rules that align updates of low rank first and let another rule merge what is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator

from acemerge.errors import UsageError
from acemerge.linalg.spectral import leading_singular, rounding_floor
from acemerge.methods.around import Over, inner_rule
from acemerge.methods.base import Layer, LayerResult, Method, Needs, Scale, Workspace, no_update
from acemerge.methods.elementwise import weighted_sum
from acemerge.methods.spectral import spectral_operations
from acemerge.shapes import Float, Tensor

_WORK = Workspace(20, 44, "columns")
_ROUNDINGS = 8  # a null direction comes out of a chain of factors, not of one product


def _inner(over: str | Mapping[str, Any]) -> Method:
    """The rule that merges turned updates, which must not look at weights or entries."""
    rule = inner_rule(over)
    needs = rule.needs
    if needs.base or needs.masks or needs.calibration:
        does = "merges weights" if needs.base else "makes masks of entries" if needs.masks else "merges by measurements"
        what = f"{rule.name} {does}"
        raise UsageError("over", f"{what}, and updates are turned here", "take a rule that merges updates alone")
    return rule


def _check(over: str | dict[str, Any]) -> str | dict[str, Any]:
    _inner(over)
    return over


def _needs(inner: Method, factors: Literal["frame", "left frame"]) -> Needs:
    weights, most = inner.needs.weights, inner.needs.most_experts
    return Needs(True, weights=weights, most_experts=most, work=_WORK, factors=factors)


_OverUpdates = Annotated[Over, AfterValidator(_check)]


@dataclass(frozen=True)
class Knots:
    """KnOTS: the updates in the left singular vectors that they have in common, merged by another rule.

        [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T];  M = U merge(diag(s) V_1^T, .., diag(s) V_T^T)

    Source: Stoica et al. 2024 (arXiv 2410.19735), there with ties. Directions at the level of rounding are left out.
    Experts of weight zero have no part in U; weights are the other rule's, which has a scale of 1 and trims, where it
    does, by the shares of these blocks. It may not be one that merges weights or makes masks.
    """

    name: ClassVar[str] = "knots"
    source: ClassVar[str] = "arXiv 2410.19735"

    over: _OverUpdates = "ties"
    scale: Scale = 1.0

    @cached_property
    def inner(self) -> Method:
        """The rule that merges."""
        return _inner(self.over)

    @property
    def needs(self) -> Needs:
        return _needs(self.inner, "left frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        columns = None if layer.frame is None else layer.frame.columns
        U = common_left(deltas, layer.weights, max(layer.sides(deltas)), columns)  # (out, k)
        if U.shape[1] == 0:
            return no_update(deltas)
        blocks = U.T @ deltas  # s_i v_i^T of every expert, (T, k, in)
        result = self.inner.merge(blocks, own_entries(layer))
        return LayerResult(U @ (self.scale * result.delta), replace(result.stats, rank=U.shape[1]))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        inner = self.inner.operations(experts, rows, columns)
        return inner + basis_operations(experts, columns, rows) + 2 * (experts + 1) * rows * rows * columns


@dataclass(frozen=True)
class CoreSpace:
    """Core space: the updates in the singular vectors that they have in common on either side, merged by another rule.

        [D_1 .. D_T] = U_B s W^T,  [D_1; ..; D_T] = Z s' V_A^T;  M = U_B merge(U_B^T D_1 V_A, .., U_B^T D_T V_A) V_A^T

    Source: Panariello et al. 2025 (arXiv 2509.17786). Nothing is lost on the way: the updates live in both spans.
    Departure: the paper takes the bases from the stacked LoRA factors B and A; those of the stacked updates span the
    same, and do not depend on how an update is split into factors. Rotations and shares of the layer's size are then
    those of the cores, about T r x T r. Weights and the other rule as in `knots`.
    """

    name: ClassVar[str] = "core_space"
    source: ClassVar[str] = "arXiv 2509.17786"

    over: _OverUpdates = "iso_c"
    scale: Scale = 1.0

    @cached_property
    def inner(self) -> Method:
        """The rule that merges."""
        return _inner(self.over)

    @property
    def needs(self) -> Needs:
        return _needs(self.inner, "frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        rows, columns = (None, None) if layer.frame is None else (layer.frame.rows, layer.frame.columns)
        longest = max(layer.sides(deltas))
        U = common_left(deltas, layer.weights, longest, columns)  # (out, p)
        V = common_left(deltas.mT, layer.weights, longest, rows)  # (in, q)
        if U.shape[1] == 0:
            return no_update(deltas)
        result = self.inner.merge(U.T @ deltas @ V, own_entries(layer))  # (T, p, q)
        M = U @ (self.scale * result.delta) @ V.T
        return LayerResult(M, replace(result.stats, rank=min(result.delta.shape)))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        bases = basis_operations(experts, columns, rows) + basis_operations(experts, rows, columns)
        turns = 2 * (experts + 1) * rows * columns * (rows + columns)
        return self.inner.operations(experts, rows, columns) + bases + turns


def common_left(
    deltas: Float[Tensor, "T out in"],
    weights: Float[Tensor, " T"],
    longest: int,
    ones: Float[Tensor, " in"] | None,
) -> Float[Tensor, "out k"]:
    """The left singular vectors of the updates side by side, in their type, null directions left out.

    From the triangular factor of the updates' transposes, one expert at a time, so that no stack is formed and small
    directions keep their digits. A vector u has the sign for which `u^T (sum_t w_t D_t) 1 >= 0`: to a rule that
    centres signs are not all the same. `longest` is the layer's longer side and `ones` is 1 (in,) in other coordinates
    than its own.
    """
    R = deltas.new_zeros(0, deltas.shape[1], dtype=torch.float64)
    for D, weight in zip(deltas, weights.tolist(), strict=True):
        if weight:
            R = torch.linalg.qr(torch.cat([R, D.T.double()]), mode="r")[1]  # (up to out, out)
    if len(R) == 0:
        return deltas.new_zeros(deltas.shape[1], 0)
    U = leading_singular(R, min(R.shape), _ROUNDINGS * rounding_floor(R, longest)).V
    total = weighted_sum(deltas, weights).double()
    sums = (total.sum(1) if ones is None else total @ ones.double()) @ U  # (k,)
    return torch.where(sums < 0, -U, U).to(deltas.dtype)


def own_entries(layer: Layer) -> Layer:
    """The layer as the other rule sees it: what is known of its entries does not hold for turned updates."""
    return replace(layer, thresholds=None, base=None, frame=None)


def basis_operations(experts: int, long: int, short: int) -> int:
    """The triangular factors of all experts, and the singular vectors of the last one."""
    return experts * 2 * (long + short) * short**2 + spectral_operations(short, short)
