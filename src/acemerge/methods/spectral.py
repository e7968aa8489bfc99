"""Rules on the singular vectors of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.known import Known, once
from acemerge.linalg.rounding import NULL
from acemerge.linalg.spectral import Singular, leading_singular, polar
from acemerge.linalg.threads import side_by_side
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.elementwise import weighted_sum
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

# The leading singular vectors of one matrix: several copies of it and of its Gram matrix, in float64 where float32 will
# not do.
DECOMPOSITION = Workspace(4, 11, "shorter")
# Another at the same time, with what its thread keeps.
_SECOND = Workspace(4, 13, "shorter")
# A second polar factor at the same time, which is when the rules that take two hold most; in iso_cts with its sum's
# vectors.
_SECOND_POLAR, _WITH_SUM = Workspace(2, 12, "shorter"), Workspace(4, 12, "shorter")


@dataclass(frozen=True)
class Cart:
    """CART: the mean, and low-rank parts of what each expert has beyond it.

        M = mean_t D_t + lam sum_t svd_k(D_t - mean_s D_s),   k = max(1, int(k_frac r)), r = min(out, in)

    Source: Choi et al. 2024, Revisiting weight averaging (arXiv 2412.12153). A weight multiplies its D_t.
    `float64_spectra` counts the experts whose spectrum was not left to float32.
    """

    name: ClassVar[str] = "cart"
    source: ClassVar[str] = "arXiv 2412.12153"
    needs: ClassVar[Needs] = Needs(matrix=True, work=Workspace(9, 11, "shorter", beside=_SECOND), factors="frame")

    lam: Annotated[float, Field(allow_inf_nan=False, description="factor on the low-rank parts")] = 1.5
    k_frac: Annotated[float, Field(ge=0, le=1, description="share of the singular directions kept")] = 0.08
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        k = max(1, int(self.k_frac * min(layer.sides(deltas))))
        mean = weighted_sum(deltas, layer.weights / len(deltas))
        M = mean.double().clone()
        wide = 0
        for part in weighted(deltas, layer.weights.tolist(), lambda D: leading_singular(D - mean, k)):
            M.add_(part.matrix(), alpha=self.lam)
            wide += part.in_float64
        stats = LayerStats(rank=k, float64_spectra=wide)
        return LayerResult((self.scale * M).to(deltas.dtype), stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return experts * spectral_operations(rows, columns)


@dataclass(frozen=True)
class TsvM:
    """TSV-M: the leading singular vectors of all experts side by side, made orthogonal to one another.

        k = int(r / T);  U_t s_t V_t^T = svd_k(D_t);  M = polar([U_1 .. U_T]) diag([s_1 .. s_T]) polar([V_1 .. V_T])^T

    Source: Gargiulo et al. 2025 (arXiv 2412.00081). Departures, where the formula is undefined: experts with no
    update drop out of T, k is at least 1, and null directions, below 2^-21 of the expert's largest singular value, have
    no singular vectors. Where [U_1 .. U_T] is singular, as for experts that share a subspace, its polar factor is that
    between the spaces of its singular values above 2^-16 of the largest: beyond them rounding would decide.
    A weight multiplies its D_t. `float64_spectra` counts the experts whose spectrum was not left to float32.
    """

    name: ClassVar[str] = "tsv_m"
    source: ClassVar[str] = "arXiv 2412.00081"
    needs: ClassVar[Needs] = Needs(matrix=True, work=Workspace(8, 13, "shorter", beside=_SECOND_POLAR), factors="frame")

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        active, weights = with_update(deltas, layer)
        if not active:
            return no_update(deltas)
        k = max(1, min(layer.sides(deltas)) // len(active))
        parts = list(
            side_by_side(lambda D: leading_singular(D, k, share=NULL, known=layer.known), active, deltas.device)
        )
        U, V = (torch.cat(blocks, 1) for blocks in ([p.U for p in parts], [p.V for p in parts]))
        s = torch.cat([weight * p.s[: p.rank] for p, weight in zip(parts, weights, strict=True)])
        M = between_polars(U, s, V).mul_(self.scale)
        stats = LayerStats(rank=len(s), float64_spectra=sum(p.in_float64 for p in parts))
        return LayerResult(M.to(deltas.dtype), stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return (experts + 2) * spectral_operations(rows, columns)


@dataclass(frozen=True)
class IsoC:
    """Iso-C: the sum of the task vectors with every singular value set to their mean.

        U s V^T = svd(sum_t D_t);  M = mean(s) U V^T

    Source: Marczak et al. 2025, No task left behind (arXiv 2502.04959). A weight multiplies its D_t. Departure: null
    directions of the sum count as zeros in the mean and stay zero, where the formula lifts rounding to the mean. They
    are those below 2^-21 of its largest singular value, and those that are left where the terms cancel to as much.
    """

    name: ClassVar[str] = "iso_c"
    source: ClassVar[str] = "arXiv 2502.04959"
    needs: ClassVar[Needs] = Needs(matrix=True, work=DECOMPOSITION, factors="frame")

    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        shortest = min(layer.sides(deltas))
        total = leading_singular(
            precise_sum(deltas, layer.weights, layer.known), shortest, cancelled(deltas, layer), NULL, layer.known
        )
        M = total.polar().mul_(self.scale * total.s.mean())
        status = Status.OK if total.rank else Status.NO_UPDATE
        return LayerResult(M.to(deltas.dtype), LayerStats((status,), rank=total.rank))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return spectral_operations(rows, columns)


@dataclass(frozen=True)
class IsoCts:
    """Iso-CTS: directions common to all experts, then each expert's own, all with one singular value.

        k0 = int(common r), p = round((r - k0) / T) T, k = r - p, q = p / T
        U_c = top k left singular vectors of sum_t D_t;  U_t s_t V_t^T = svd_q((I - U_c U_c^T) D_t)
        M = mean(all s) polar([U_1 .. U_T U_c]) polar([V_1 .. V_T V_c])^T

    Source: Marczak et al. 2025 (arXiv 2502.04959). A weight multiplies its D_t. Departures: experts with no update drop
    out of T; q is at most r // T, where rounding up would leave k below zero; null directions have no singular vectors
    and count as zeros in the mean. They are those of the sum, as in `iso_c`, those in which (I - U_c U_c^T) D_t has
    less than 2^-21 ||D_t||_F, times the condition of the sum where U_c holds all of it, and those of the polar factors,
    as in `tsv_m`.
    """

    name: ClassVar[str] = "iso_cts"
    source: ClassVar[str] = "arXiv 2502.04959"
    needs: ClassVar[Needs] = Needs(matrix=True, work=Workspace(8, 13, "shorter", beside=_WITH_SUM), factors="frame")

    common: Annotated[float, Field(ge=0, le=1, description="share of the directions taken from the sum")] = 0.8
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        active, weights = with_update(deltas, layer)
        if not active:
            return no_update(deltas)
        r, T = min(layer.sides(deltas)), len(active)
        q = min(round((r - int(self.common * r)) / T), r // T)
        shared = leading_singular(
            precise_sum(deltas, layer.weights, layer.known), r - q * T, cancelled(deltas, layer), NULL, layer.known
        )

        covered = float(shared.s[0] / shared.s[shared.rank - 1]) if 0 < shared.rank < len(shared.s) else 1.0

        def own(D: Tensor, weight: float) -> Singular:
            X = D.double() * weight
            return leading_singular(X - shared.U @ (shared.U.T @ X), q, floor=NULL * covered * float(X.norm()))

        pairs = zip(active, weights, strict=True) if q else ()
        parts = [*(own(D, weight) for D, weight in pairs), shared]
        U, V = (torch.cat(blocks, 1) for blocks in ([p.U for p in parts], [p.V for p in parts]))
        s = torch.cat([p.s for p in parts])
        M = between_polars(U, None, V).mul_(self.scale * s.mean())
        return LayerResult(M.to(deltas.dtype), LayerStats(rank=U.shape[1]))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return (experts + 3) * spectral_operations(rows, columns)


def with_update(deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[list[Tensor], Sequence[float]]:
    """The task vectors that are not zero and have a weight, and these weights."""
    kept: list[int] = ((energies(deltas) > 0) & (layer.weights != 0)).nonzero().flatten().tolist()
    weights = layer.weights.tolist()
    return [deltas[t] for t in kept], [weights[t] for t in kept]


def precise_sum(
    deltas: Float[Tensor, "T out in"], weights: Float[Tensor, " T"], known: Known | None = None
) -> Float[Tensor, "out in"]:
    """`sum_t w_t D_t` in float64, for rules that lift small directions of it: float32's rounding is as large."""
    factors = tuple(weights.tolist())

    def added() -> Tensor:
        total = torch.zeros_like(deltas[0], dtype=torch.float64)
        for D, weight in zip(deltas, factors, strict=True):
            total.add_(D, alpha=weight)
        return total

    return once(known, ("sum", factors), deltas, added)


def cancelled(deltas: Float[Tensor, "T out in"], layer: Layer) -> float:
    """What terms that cancel may leave of a direction of their sum, the singular values of noise in all entries:
    `2^-21 (sum_t w_t^2 ||D_t||_F^2 / min(out, in))^(1/2)`.
    """
    squares = float(layer.weights.square() @ energies(deltas))
    return NULL * math.sqrt(squares / min(layer.sides(deltas)))


def weighted(
    experts: Sequence[Tensor] | Tensor, weights: Sequence[float], function: Callable[[Tensor], Singular]
) -> Iterator[Singular]:
    """`function(w_t D_t)` of every expert, side by side."""
    return side_by_side(lambda t: function(weights[t] * experts[t]), range(len(weights)), experts[0].device)


def between_polars(
    U: Float[Tensor, "out k"], s: Float[Tensor, " k"] | None, V: Float[Tensor, "in k"]
) -> Float[Tensor, "out in"]:
    """`polar(U) diag(s) polar(V)^T`; ones for s where it is None."""
    left, right = side_by_side(polar, (U, V), U.device)
    return (left if s is None else left * s) @ right.T


def spectral_operations(rows: int, columns: int) -> int:
    """A Gram matrix of the shorter side n, its eigen-decomposition (about 9 n^3) and a product back."""
    n = min(rows, columns)
    return 3 * rows * columns * n + 9 * n**3
