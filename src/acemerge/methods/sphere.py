"""Rules from the geometry of whole tensors: angles between experts, and means on the sphere.

All that they need of the tensors is their inner products: the work is one small Gram matrix of the flattened
tensors and one weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.methods.base import Layer, LayerResult, Needs, Scale, no_update
from acemerge.methods.elementwise import Blocks, row_blocks, weighted_sum
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_PARALLEL = 1 - 0.9995  # an angle whose cosine is nearer to one is interpolated straight
_SHORT = 1e-8
_OPPOSITE = math.pi - 1e-6  # from here on an angle has no direction but rounding's
# What `Weights` hold with the result, and what inner products alone do.
WEIGHING = Blocks(block=3.0, block_each=5.0)
_COMPARING = Blocks(block_each=4.0)


@dataclass(frozen=True)
class Slerp:
    """Spherical interpolation of two experts' weights, or of the base and one expert.

        W = sin((1 - t) a) / sin(a) W_1 + sin(t a) / sin(a) W_2,   a the angle between W_1 and W_2

    Source: Shoemake 1985; as mergekit documents it. Tensors are flattened; nearly parallel ones (|cos a| above
    0.9995) are interpolated straight. With one expert W_1 is the base. Without a base the task vectors
    themselves are interpolated. A weight multiplies its task vector.
    """

    name: ClassVar[str] = "slerp"
    source: ClassVar[str] = "Shoemake 1985"
    needs: ClassVar[Needs] = Needs(base=True, most_experts=2, work=WEIGHING)

    t: Annotated[float, Field(ge=0, le=1, description="place between the first, 0, and the second, 1")] = 0.5
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        ends = Weights(deltas, layer.weights, layer.base, with_base=len(deltas) == 1)
        gram = ends.gram()
        norms = gram.diagonal().sqrt()
        cosine = float((gram[0, 1] / norms.prod()).clamp(-1, 1)) if norms.min() > _SHORT else 1.0
        if 1 - abs(cosine) < _PARALLEL:
            shares, status = [1 - self.t, self.t], Status.STRAIGHT
        else:
            angle = math.acos(cosine)
            shares = [math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)]
            status = Status.OK
        return LayerResult(ends.update(shares, self.scale), LayerStats((status,), cosine=cosine))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return 10 * rows * columns


@dataclass(frozen=True)
class ModelStock:
    """Model stock: shrink the mean towards the base, by the angle between the experts.

        M = t mean_t D_t,   t = T c / (1 + (T - 1) c),   c the mean cosine between two task vectors

    Source: Jang et al. 2024 (arXiv 2403.19522), section 3.2, per tensor. Experts without an update drop out;
    one expert is kept whole. With `still: count` they count, at a right angle to all others, as mergekit has it.
    Where the experts cancel altogether the denominator is zero, and so is M.
    """

    name: ClassVar[str] = "model_stock"
    source: ClassVar[str] = "arXiv 2403.19522"
    needs: ClassVar[Needs] = Needs(work=_COMPARING)

    still: Annotated[
        Literal["drop", "count"], Field(description="what experts without an update do: drop out, or count")
    ] = "drop"
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        gram = inner_products(deltas) * torch.outer(layer.weights, layer.weights)
        norms = gram.diagonal().sqrt()
        moved = int((norms > 0).sum())
        if moved == 0:
            return no_update(deltas)
        T = moved if self.still == "drop" else len(deltas)
        inverse = torch.where(norms > 0, 1 / norms, 0)
        cosines = gram * torch.outer(inverse, inverse)
        mean_cosine = (float(cosines.sum()) - moved) / max(1, T * (T - 1)) if T > 1 else 1.0
        denominator = 1 + (T - 1) * mean_cosine
        share = T * mean_cosine / denominator if denominator > _SHORT else 0.0
        status = Status.OK if denominator > _SHORT else Status.CANCELLED
        factors = torch.where(norms > 0, layer.weights, 0) * (self.scale * share / T)
        return LayerResult(weighted_sum(deltas, factors), LayerStats((status,), cosine=mean_cosine, share=share))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return experts * (experts + 2) * rows * columns


@dataclass(frozen=True)
class Karcher:
    """The Karcher mean of the experts' weights: directions are averaged on the sphere, lengths as numbers.

        u   = the minimiser of sum_t a_t angle(u, W_t)^2,   a_t = w_t / sum w
        W   = (sum_t a_t ||W_t||) u

    found by steps along the mean of the logarithms, from the mean direction. Source: Grove and Karcher 1973;
    as mergekit documents it. Tensors are flattened; zero tensors drop out. Without a base the task vectors
    themselves are averaged. Departures, where there is no unique minimiser: what is opposite to the mean pulls it
    nowhere, and where directions cancel altogether M is zero.
    """

    name: ClassVar[str] = "karcher"
    source: ClassVar[str] = "Grove and Karcher 1973"
    needs: ClassVar[Needs] = Needs(base=True, weights="not negative", work=WEIGHING)

    steps: Annotated[int, Field(ge=1, le=1000, description="most steps of the iteration")] = 10
    tol: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a shorter step ends it, in radians")] = 1e-5
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        ends = Weights(deltas, torch.ones_like(layer.weights), layer.base)
        gram = ends.gram()
        norms = gram.diagonal().sqrt()
        kept = (norms > _SHORT) & (layer.weights > 0)
        if not kept.any():
            return no_update(deltas)
        a = layer.weights[kept] / layer.weights[kept].sum()
        cosines = gram[kept][:, kept] / torch.outer(norms[kept], norms[kept])
        if float(a @ cosines @ a) < _SHORT:
            return LayerResult(torch.zeros_like(deltas[0]), LayerStats((Status.CANCELLED,)))
        u, last = mean_direction(cosines, a, self.steps, self.tol)
        factors = torch.zeros_like(norms)
        factors[kept] = u * (a * norms[kept]).sum() / norms[kept]
        status = Status.OK if last <= self.tol else Status.NOT_CONVERGED
        return LayerResult(ends.update(factors.tolist(), self.scale), LayerStats((status,), last_step=last))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return experts * (experts + 3) * rows * columns


def mean_direction(
    cosines: Float[Tensor, "T T"], a: Float[Tensor, " T"], steps: int, tol: float
) -> tuple[Float[Tensor, " T"], float]:
    """The Karcher mean of unit vectors with Gram matrix `cosines` as a combination of them, and its last step."""
    u = a / (a @ cosines @ a).sqrt()
    size = math.inf
    for _ in range(steps):
        cosine = (cosines @ u).clamp(-1, 1)
        angle = torch.arccos(cosine)
        stretch = a * torch.where(angle > _SHORT, angle / torch.sin(angle).clamp_min(_SHORT), 1) * (angle < _OPPOSITE)
        step = stretch - (stretch @ cosine) * u  # sum_t a_t log_u(W_t), as coefficients
        size = float((step @ cosines @ step).clamp_min(0).sqrt())
        if size <= tol:
            break
        u = math.cos(size) * u + math.sin(size) / size * step
    return u, size


@dataclass(frozen=True)
class Weights:
    """The weights `W_0 + f_t D_t`, the base itself in front where asked, never all formed at once."""

    deltas: Float[Tensor, "T *shape"]
    factors: Float[Tensor, " T"]
    base: Float[Tensor, "*shape"] | None
    with_base: bool = False

    def _block(self, rows: slice) -> Float[Tensor, "N rows *rest"]:
        factors = self.factors.to(self.deltas.dtype).view(-1, *[1] * (self.deltas.ndim - 1))
        block = self.deltas[:, rows] * factors
        if self.with_base:
            block = torch.cat([torch.zeros_like(block[:1]), block])
        return block if self.base is None else block + self.base[rows]

    def gram(self) -> Float[Tensor, "N N"]:
        """Inner products of the flattened weights, float64."""
        return sum_of_grams(self._block(rows) for rows in row_blocks(self.deltas))

    def update(self, shares: list[float], scale: float) -> Float[Tensor, "*shape"]:
        """`scale (sum_i shares_i W_i - W_0)`."""
        M = torch.empty_like(self.deltas[0])
        for rows in row_blocks(self.deltas):
            merged = torch.tensordot(torch.tensor(shares, dtype=M.dtype).to(M.device), self._block(rows), dims=1)
            M[rows] = (merged if self.base is None else merged - self.base[rows]) * scale
        return M


def inner_products(deltas: Float[Tensor, "T *shape"]) -> Float[Tensor, "T T"]:
    """`<D_s, D_t>` of the flattened tensors, products in float64."""
    return sum_of_grams(deltas[:, rows] for rows in row_blocks(deltas))


def sum_of_grams(blocks: Iterable[Float[Tensor, "N *rest"]]) -> Float[Tensor, "N N"]:
    """`sum_b X_b X_b^T` of flattened blocks, in float64."""
    total: Tensor | None = None
    for block in blocks:
        flat = block.flatten(1).double()
        total = flat @ flat.T if total is None else total.addmm_(flat, flat.T)
    assert total is not None
    return total
