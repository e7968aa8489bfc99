"""Rules that align updates of low rank first and let another rule merge what is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch

from acemerge.errors import UsageError
from acemerge.linalg.lowrank import Frame
from acemerge.linalg.rounding import NULL
from acemerge.linalg.spectral import leading_singular
from acemerge.methods.around import Over, accepted_by, inner_rule
from acemerge.methods.base import Layer, LayerResult, Method, Needs, Scale, Work, no_update
from acemerge.methods.spectral import precise_sum, spectral_operations
from acemerge.shapes import Float, Tensor

_UNJOINED = 10_000_000  # entries


@dataclass(frozen=True)
class _Turned:
    """What is held while bases are found, and then: these in float64, the turned updates, and while they are made a
    second copy or one in float64, or what the other rule works in with its result. What it frees is of so many sizes
    that the C library joins little of it.
    """

    both_sides: bool
    inner: Work

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        count, finding = rows * columns, _finding(experts, rows, columns)
        bases = 2 * rows * min(rows, experts * columns)
        if self.both_sides:
            finding = max(finding, bases + _finding(experts, columns, rows))
            bases += 2 * columns * min(columns, experts * rows)
        merging = max(experts * count, 4 * count, self.inner.entries(experts, rows, columns, threads) + count)
        own = max(finding, bases + experts * count + merging)
        return own + min(own, _UNJOINED)


def _finding(experts: int, rows: int, columns: int) -> int:
    """While a basis of the left side is found: its singular vectors, and copies of a triangular factor that is wide."""
    return 14 * min(rows, experts * columns) ** 2 + 3 * max(0, rows - columns) * rows


def _inner(over: str | Mapping[str, Any]) -> Method:
    """The rule that merges turned updates, which must not look at weights or entries."""
    rule = inner_rule(over)
    needs = rule.needs
    if needs.base or needs.masks or needs.calibration:
        does = "merges weights" if needs.base else "makes masks of entries" if needs.masks else "merges by measurements"
        what = f"{rule.name} {does}"
        raise UsageError("over", f"{what}, and updates are turned here", "take a rule that merges updates alone")
    return rule


def _needs(inner: Method, factors: Literal["frame", "left frame"]) -> Needs:
    weights, most, energy = inner.needs.weights, inner.needs.most_experts, inner.needs.base_energy
    work = _Turned(factors == "frame", inner.needs.work)
    return Needs(True, base_energy=energy, weights=weights, most_experts=most, work=work, factors=factors)


_OverUpdates = Annotated[Over, accepted_by(_inner)]


@dataclass(frozen=True)
class Knots:
    """KnOTS: the updates in the left singular vectors that they have in common, merged by another rule.

        [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T];  M = U merge(diag(s) V_1^T, .., diag(s) V_T^T)

    Source: Stoica et al. 2024 (arXiv 2410.19735), there with ties. Directions below 2^-21 of the largest
    are left out: a rule that counts or ranks entries would meet rounding there. Their signs, which are free and which a
    rule that centres or votes depends on, are fixed: see `common_left`.
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
        frame = _frame(deltas, layer)
        U = common_left(deltas, layer.weights, frame.columns, frame.row_probe)  # (out, k)
        return _merged_between(self.inner, self.scale, deltas, layer, U)

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
        frame = _frame(deltas, layer)
        U = common_left(deltas, layer.weights, frame.columns, frame.row_probe)  # (out, p)
        V = common_left(deltas.mT, layer.weights, frame.rows, frame.column_probe)  # (in, q)
        return _merged_between(self.inner, self.scale, deltas, layer, U, V)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        bases = basis_operations(experts, columns, rows) + basis_operations(experts, rows, columns)
        turns = 2 * (experts + 1) * rows * columns * (rows + columns)
        return self.inner.operations(experts, rows, columns) + bases + turns


def _frame(deltas: Float[Tensor, "T out in"], layer: Layer) -> Frame:
    return layer.frame or Frame.itself(layer.sides(deltas), deltas)


def _merged_between(
    inner: Method,
    scale: float,
    deltas: Float[Tensor, "T out in"],
    layer: Layer,
    U: Float[Tensor, "out p"],
    V: Float[Tensor, "in q"] | None = None,
) -> LayerResult:
    """The updates in the coordinates of U, and of V where there is one, merged by the inner rule and turned back."""
    if U.shape[1] == 0:
        return no_update(deltas)
    turned = (U.T @ D.double() if V is None else U.T @ D.double() @ V for D in deltas)
    result = inner.merge(torch.stack([block.to(deltas.dtype) for block in turned]), own_entries(layer))
    M = U.to(deltas.dtype) @ (scale * result.delta)
    if V is None:
        return LayerResult(M, replace(result.stats, rank=U.shape[1]))
    return LayerResult(M @ V.to(deltas.dtype).T, replace(result.stats, rank=min(result.delta.shape)))


def common_left(
    deltas: Float[Tensor, "T out in"],
    weights: Float[Tensor, " T"],
    ones: Float[Tensor, " in"],
    probe: Float[Tensor, " out"],
) -> Float[Tensor, "out k"]:
    """The left singular vectors of the updates side by side, in float64, null directions left out.

    From the triangular factor of the updates' transposes, one expert at a time, so that no stack is formed and small
    directions keep their digits. A vector u has the sign for which `u^T (sum_t w_t D_t) 1 >= 0`: to a rule that
    centres signs are not all the same. Where this is zero but for rounding, as for updates whose rows sum to zero, it
    is the sign of `u^T probe`. `ones` and `probe` are those of the layer, in the coordinates of the updates.
    """
    R = deltas.new_zeros(0, deltas.shape[1], dtype=torch.float64)
    for D, weight in zip(deltas, weights.tolist(), strict=True):
        if weight:
            R = torch.linalg.qr(torch.cat([R, D.T.double()]), mode="r")[1]  # (up to out, out)
    if len(R) == 0:
        return deltas.new_zeros(deltas.shape[1], 0)
    found = leading_singular(R, min(R.shape), share=NULL)
    U, s = found.V, found.s[: found.rank]
    sums = (precise_sum(deltas, weights) @ ones.double()) @ U  # (k,)
    clear = sums.abs() > NULL * s * float(weights.norm() * deltas.shape[2] ** 0.5)
    return torch.where(torch.where(clear, sums, probe.double() @ U) < 0, -U, U)


def own_entries(layer: Layer) -> Layer:
    """The layer as the other rule sees it: what is known of its entries does not hold for turned updates."""
    return replace(layer, thresholds=None, base=None, base_energy=layer.energy_of_base(), frame=None, known=None)


def basis_operations(experts: int, long: int, short: int) -> int:
    """The triangular factors of all experts, and the singular vectors of the last one."""
    return experts * 2 * (long + short) * short**2 + spectral_operations(short, short)
