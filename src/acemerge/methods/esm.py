"""Essential subspace merging: each expert's update in the output directions that its own inputs move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import largest_entry
from acemerge.linalg.spectral import SHARED, leading_singular
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.spectral import TsvM, spectral_operations, with_update
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Esm:
    """Essential subspace merging: the output directions in which each expert's update moves its own inputs most.

        D_t G_t D_t^T = E_t diag(e_t) E_t^T, descending,   G_t = Z_t^T Z_t / N;   k = int(out / T)
        V_t = E_t^T D_t n_t / (mean_s n_s^(1/2))^2,   g_t = (e_t / mean(e_t))^p / its mean, over the first k
        U = [E_1 g_1 .. E_T g_T] (out, T k),  V = [g_1 V_1; ..; g_T V_T] (T k, in), of the first k each
        column j of V times (||V_j|| / mean_i ||V_i||)^2;   M = 2 mean(s(U)) mean(s(V)) polar(U) polar(V)

    of the N inputs Z_t (N, in) of the layer in expert t's network on its own data, some 32 unlabelled examples; see
    `--calibration`. s() are the min(rows, columns) singular values of a matrix. Source: Li et al. 2026
    (arXiv 2606.19164; CVPR, arXiv 2602.20208) and its code for vision, kiddo127/ESM, where E_t are the right singular
    vectors of Z_t D_t^T.
    Departures: at the end their code multiplies each layer by the square of its norm over the mean norm of its kind in
    all layers, which a rule that sees one layer cannot. It measures query, key and value as one and the MLP, and takes
    tsv_m for the output projection; here every layer whose inputs were seen is measured, and tsv_m is for those that
    were not, as the status says. k is at least 1. Directions with e_t below 2^-21 of the largest, which moments in
    float32 do not tell from rounding, are none, with g_t = 0. Experts without an update, or whose data did not reach
    the layer, drop out of T. Polar factors as in `tsv_m`. Their runs search the scale on data. A weight multiplies its
    D_t. `condition` is the larger one of U's and V's.
    """

    name: ClassVar[str] = "esm"
    source: ClassVar[str] = "arXiv 2606.19164"
    needs: ClassVar[Needs] = Needs(matrix=True, work=Workspace(16, 54, "longer", each=4), calibration="inputs")

    p: Annotated[float, Field(ge=0, allow_inf_nan=False, description="how far strong directions are preferred")] = 0.15
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        if not with_update(deltas, layer)[0]:
            return no_update(deltas)
        size = largest_entry(deltas)
        parts = [] if layer.moments is None else self._parts(deltas.double() / size, layer.moments, layer.weights)
        if not parts:
            found = TsvM(self.scale).merge(deltas, layer)
            return replace(found, stats=replace(found.stats, statuses=(Status.UNSEEN_SPECTRAL,)))
        mean_root = sum(part.n**0.5 for part in parts) / len(parts)
        U = torch.cat([part.E * part.g for part in parts], 1)  # (out, T k)
        V = torch.cat([part.rows * (part.g[:, None] * (part.n / mean_root**2)) for part in parts])  # (T k, in)
        columns = V.norm(dim=0)
        V = V * (columns / columns.mean()).square()
        (left, of_left), (right, of_right) = _lifted(U), _lifted(V)
        M = (left @ right).mul_(2 * self.scale * size)
        stats = LayerStats(rank=min(*U.shape, *V.shape), condition=max(of_left, of_right))
        return LayerResult(M.to(deltas.dtype), stats)

    def _parts(self, deltas: Float[Tensor, "T out in"], moments: Tensor, weights: Float[Tensor, " T"]) -> list[_Part]:
        """Of the experts that have an update, a weight and inputs that it moves."""
        active = [
            (w * D, G.double())
            for D, G, w, n in zip(deltas, moments, weights.tolist(), energies(deltas).tolist(), strict=True)
            if w and n and G.any() and bool((D @ G.double()).any())
        ]
        k = max(1, deltas.shape[1] // max(1, len(active)))
        return [_part(D, G, k, self.p) for D, G in active]

    def operations(self, experts: int, rows: int, columns: int) -> int:
        essential = 2 * rows * columns * (rows + columns) + 9 * rows**3
        return experts * essential + 2 * spectral_operations(rows, columns)


@dataclass(frozen=True)
class _Part:
    """An expert's first k output directions, its rows `E^T D` there, the factors g on both, and `||D||_F^2`."""

    E: Float[Tensor, "out k"]
    rows: Float[Tensor, "k in"]
    g: Float[Tensor, " k"]
    n: float


def _part(D: Float[Tensor, "out in"], G: Float[Tensor, "in in"], k: int, p: float) -> _Part:
    values, vectors = torch.linalg.eigh(D @ G @ D.T)
    e, E = values.flip(0)[:k], vectors.flip(1)[:, :k]
    g = torch.where(e > NULL * e[0], (e.clamp_min(0) / e.clamp_min(0).mean()) ** p, 0)
    return _Part(E, E.T @ D, g / g.mean(), float(energies(D[None])))


def _lifted(X: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m n"], float]:
    """`mean(s(X)) polar(X)`, polar between the spaces of the singular values above 2^-16 of the largest, and how far
    apart these are: what it magnifies rounding by.
    """
    r = min(X.shape)
    found = leading_singular(X, r)
    kept = found.s[: found.rank] > SHARED * found.s[0]
    lifted = (found.U[:, kept] @ found.V[:, kept].T) * (found.s.sum() / r)
    return lifted, float(found.s[0] / found.s[: found.rank][kept][-1])
