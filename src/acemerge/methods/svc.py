"""A wrapper that calibrates the singular values of what another rule made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.rounding import NULL
from acemerge.linalg.spectral import leading_singular
from acemerge.methods.around import Over, inner_rule
from acemerge.methods.base import Layer, LayerResult, Method, Needs, Scale, Workspace
from acemerge.methods.spectral import spectral_operations, with_update
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Svc:
    """Singular value calibration of another rule's update M: directions that some experts already overshoot
    shrink, by how much of each expert's own update they hold.

        U s V^T = svd(M);  q_rt = <u_r^T M, u_r^T D_t> / ||u_r^T D_t||^2
        s_r <- s_r T / sum_t max(a, q_rt)

    Source: arXiv 2602.05536. `a` is 1 / T where absent; the paper takes 1 for merges like tsv_m. M has no scale:
    give svc's own. Departures, where the formula is undefined: experts with no update drop out of T; directions of M
    below 2^-21 of the largest stay zero; and q_rt = 0 where an expert has nothing in a direction, that is less than
    2^-21 s_1 / s_r of what it has in its largest one.
    Where M has equal singular values, as iso_c's, its directions are not unique and neither is the result.
    """

    name: ClassVar[str] = "svc"
    source: ClassVar[str] = "arXiv 2602.05536"

    over: Over = "ace"
    a: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="least share of an expert; 1 / T where absent")
    ] = None
    scale: Scale = 1.0

    @cached_property
    def inner(self) -> Method:
        """The rule it calibrates."""
        return inner_rule(self.over)

    @property
    def needs(self) -> Needs:
        inner = self.inner.needs
        # One after the other: what it calibrates, the shares on the system, the singular vectors.
        own = Workspace(8, 4, "system", then=inner.work)
        work = Workspace(10, 8, "shorter", then=own)
        return replace(
            inner,
            matrix=True,
            entrywise=False,
            masks=False,
            work=work,
            factors="frame" if inner.factors == "linear" else inner.factors,
        )

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        inner = self.inner.merge(deltas, layer)
        active, weights = with_update(deltas, layer)
        found = leading_singular(inner.delta, min(inner.delta.shape), share=NULL)
        U, s = found.U, found.s[: found.rank]
        rows = (found.V * s).T  # (r, in): u_r^T M = s_r v_r^T, also where s_r is so small that u_r is rounding
        calls = torch.zeros(len(rows), dtype=U.dtype, device=U.device)
        for D, weight in zip(active, weights, strict=True):
            own = U.T @ (weight * D.double())  # (r, in)
            squares = own.square().sum(1)
            # Where the update has no part rounding still leaves so much, for u_r itself is off by its share of s_r.
            nothing = squares.amax() * (NULL * s[0] / s).square() if len(s) else s
            q = torch.where(squares > nothing, (rows * own).sum(1) / squares, 0)
            calls += q.clamp_min(1 / len(active) if self.a is None else self.a)
        factors = self.scale * len(active) / calls
        return LayerResult(((U * factors) @ rows).to(deltas.dtype), replace(inner.stats, rank=U.shape[1]))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        inner = self.inner.operations(experts, rows, columns)
        return inner + 2 * spectral_operations(rows, columns) + 2 * experts * rows * columns * min(rows, columns)
