"""DC-Merge: the experts' singular directions in common spaces that cover them, with a vote there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import kth_largest_magnitude, largest_entry, share_of
from acemerge.linalg.spectral import SHARED, Singular, leading_singular, polar
from acemerge.linalg.threads import side_by_side
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.spectral import spectral_operations, with_update
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_SECOND = Workspace(5)  # a decomposition beside another: most is held later, by the cores
_STEEPEST = 5.0  # of the first singular value to the last, where they are smoothed to a line
Smooth = Literal["none", "mean", "linear"]


@dataclass(frozen=True)
class DcMerge:
    """DC-Merge: each expert's leading singular directions in two spaces that cover those of all, with a vote there.

        k = int(r / T), r = min(out, in);  U_t s_t V_t^T = svd_k(D_t);  P = polar([U_1 .. U_T]), Q = polar([V_1 .. V_T])
        C_t = P^T U_t diag(s_t) V_t^T Q, of (T k)^2 entries the `top` share that is largest in magnitude
        C = the mean, entry by entry, of those C_t that have the sign of sum_t C_t, 0 where the sum is 0
        M = P blocks(C) Q^T,   of C the T blocks of side k on the diagonal

    Source: Zhang et al. 2026 (arXiv 2603.06242) and its code for full fine-tunes, Tobeginwith/DC-Merge. `smooth`
    spreads each expert's singular values, their sum kept: over all k alike ("mean"), or along a line from
    min(5, s_1 / s_k) to 1 ("linear"). The paper smooths always; its code smooths adapters, with "mean", and full
    fine-tunes not. Their runs search the scale on data.
    Departures: experts with no update drop out of T; k is at least 1, and never more than what an expert has of
    directions above 2^-21 of its largest, which for adapters is their rank, as in their code. Polar factors as in
    `tsv_m`. Entries of a core below 2^-21 of its largest are no votes, those level with the last one kept up to 2^-16
    are kept, and sums that cancel to 2^-21 are 0. Where T does not divide r their code counts the `top` share of r^2
    entries. A weight multiplies its D_t.
    """

    name: ClassVar[str] = "dc_merge"
    source: ClassVar[str] = "arXiv 2603.06242"
    needs: ClassVar[Needs] = Needs(
        matrix=True, work=Workspace(4, 8, "shorter", squares_each=9, beside=_SECOND), factors="frame"
    )

    top: Annotated[float, Field(gt=0, le=1, description="share of a core's entries that are kept, the largest")] = 1e-3
    smooth: Annotated[Smooth, Field(description="how an expert's singular values are spread")] = "none"
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        active, weights = with_update(deltas, layer)
        if not active:
            return no_update(deltas)
        k = max(1, min(layer.sides(deltas)) // len(active))

        def leading(D: Tensor) -> Singular:
            return leading_singular(D, k, share=NULL, known=layer.known, in_float64=True)

        parts = list(side_by_side(leading, active, deltas.device))
        U, V = ([part.U for part in parts], [part.V for part in parts])
        P, Q = side_by_side(polar, (torch.cat(U, 1), torch.cat(V, 1)), deltas.device)
        values = [w * _smoothed(p.s[: p.rank], self.smooth) for p, w in zip(parts, weights, strict=True)]
        cores = [(P.T @ u * s) @ (v.T @ Q) for u, s, v in zip(U, values, V, strict=True)]
        C = _elected(torch.stack([_top(core, self.top) for core in cores]))
        sides = [part.rank for part in parts]
        M = torch.zeros_like(deltas[0], dtype=torch.float64)
        for P_t, C_t, Q_t in zip(P.split(sides, 1), _blocks(C, sides), Q.split(sides, 1), strict=True):
            M.addmm_(P_t @ C_t, Q_t.T, alpha=self.scale)
        return LayerResult(M.to(deltas.dtype), LayerStats(rank=sum(sides)))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        r = min(rows, columns)
        return (experts + 2) * spectral_operations(rows, columns) + 4 * experts * r**3


def _smoothed(s: Float[Tensor, " k"], smooth: Smooth) -> Float[Tensor, " k"]:
    if smooth == "none":
        return s
    first = min(_STEEPEST, float(s[0] / s[-1])) if smooth == "linear" else 1.0
    shares = torch.linspace(first, 1.0, len(s), dtype=s.dtype, device=s.device)
    return s.sum() * shares / shares.sum()


def _top(core: Float[Tensor, "K K"], share: float) -> Float[Tensor, "K K"]:
    """The largest entries, the others zero. Directions that polar factors share are level only so far."""
    last = kth_largest_magnitude(core, share_of(share, core.numel()))
    kept = (core.abs() >= last * (1 - SHARED)) & (core.abs() > NULL * largest_entry(core))
    return core * kept


def _elected(cores: Float[Tensor, "T K K"]) -> Float[Tensor, "K K"]:
    """The mean of the non-zero entries that have the sign of their sum."""
    total, most = cores.sum(0), cores.abs().sum(0)
    agree = (cores.sign() == total.sign()) & (total.abs() > NULL * most)
    mean: Tensor = (cores * agree).sum(0) / agree.sum(0).clamp(min=1)
    return mean


def _blocks(C: Float[Tensor, "K K"], sides: list[int]) -> list[Tensor]:
    """The blocks of these sides on the diagonal."""
    return [rows.split(sides, 1)[t] for t, rows in enumerate(C.split(sides))]
