"""What the rules with a weight on the outputs as well as on the inputs have in common: the system that they solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from acemerge.linalg.gram import energies
from acemerge.linalg.select import largest_entry
from acemerge.linalg.two_sided import Map, Spiked, dot, pooled_inverse, spiked_sides, spiked_sum
from acemerge.methods.base import Layer
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_FEWEST = 64  # directions that are always kept: in small layers all of them
Products = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Upright:
    """The experts with an update and a weight, transposed where they have more columns than rows.

    Rules with a weight on both sides merge the transposes to the transpose. `sizes` are the layer's, turned alike.
    """

    experts: list[Tensor]
    weights: list[float]
    sizes: tuple[int, int]
    turned: bool

    def turned_back(self, M: Float[Tensor, "rows columns"]) -> Float[Tensor, "out in"]:
        return M.T if self.turned else M


def upright(deltas: Float[Tensor, "T out in"], layer: Layer) -> Upright | None:
    """None where no expert has both."""
    kept: list[int] = ((energies(deltas) > 0) & (layer.weights > 0)).nonzero().flatten().tolist()
    if not kept:
        return None
    rows, columns = layer.sides(deltas)
    turned = deltas.shape[1] < deltas.shape[2]
    experts = [deltas[t].T if turned else deltas[t] for t in kept]
    weights = layer.weights.tolist()
    return Upright(experts, [weights[t] for t in kept], (columns, rows) if turned else (rows, columns), turned)


@dataclass(frozen=True)
class System:
    """`sum_t A_t X S_t = B = sum_t A_t D_t S_t`, for the updates D_t over `size`, the largest of all their entries, so
    that float32 holds their squares.

        A_t = (D_t D_t^T)^(1/2),  S_t = (D_t^T D_t)^(1/2),  each over its mean eigenvalue, all eigenvalues beyond the
              k largest at their mean, k = max(64, int(keep min(out, in)))
        L = sum_t A_t / T^(1/2) + d T^(1/2) I,  R = sum_t S_t / T^(1/2) + d T^(1/2) I

    `applied` is the left-hand side, `pooled` the map `X -> L^(-1) X R^(-1)`, both coarse where `exact` is the left-hand
    side too. Where L and R only precondition, fewer than k directions may be told apart in them. `wanted` is
    `sum_t <D_t, A_t D_t S_t>` and `rounding` what the norm of B may be by rounding alone. Weights count experts: with a
    weight w A_t and S_t have its root in them, their share of L and R that of `w / T`, and T is the sum of the weights.
    """

    applied: Map
    pooled: Map
    exact: Map | None
    B: Float[Tensor, "out in"]
    wanted: float
    rounding: float
    size: float


def system(
    tall: Upright,
    keep: float,
    pooled_keep: float,
    damping: float,
    dtype: torch.dtype,
    products: Products = "float32",
    even: Sequence[float] | None = None,
) -> System:
    """In `dtype`, or in float64 where float32 would not do, as for updates of low rank: `B.dtype` tells. `damping` is
    the d of L and R, `pooled_keep` their `keep`. In float32 `products` may be coarser. `even` are the experts' shares
    of I in A_t and S_t, none if not given.
    """
    found = _spiked(tall, keep, dtype, even or [0.0] * len(tall.experts))
    if found is None:  # what was made of it is gone
        return system(tall, keep, pooled_keep, damping, torch.float64, products, even)
    sides, B, wanted, pull, size = found
    total = sum(tall.weights)
    shares, d = [(w / total) ** 0.5 for w in tall.weights], damping * total**0.5
    exact, rounding = spiked_sum(sides), 16 * torch.finfo(dtype).eps * pull
    of_pooled = kept_directions(pooled_keep, min(tall.sizes))
    leading = [side.leading(of_pooled, tall.sizes) for side in sides]
    if products == "float32" or dtype == torch.float64:
        return System(exact, pooled_inverse(leading, shares, d), None, B, wanted, rounding, size)
    coarse, pooled = spiked_sum(sides, torch.bfloat16), pooled_inverse(leading, shares, d, torch.bfloat16)
    return System(coarse, pooled, exact, B, wanted, rounding, size)


def _spiked(
    tall: Upright, keep: float, dtype: torch.dtype, even: Sequence[float]
) -> tuple[list[Spiked], Float[Tensor, "out in"], float, float, float] | None:
    """Both sides of every expert, `B`, `wanted`, the norms of the terms of B together and `size`; None where `dtype`
    would not do.
    """
    k = kept_directions(keep, min(tall.sizes))
    sides: list[Spiked] = []
    B = torch.zeros_like(tall.experts[0], dtype=dtype, memory_format=torch.contiguous_format)
    wanted = pull = 0.0
    size = max(largest_entry(D) for D in tall.experts)
    for expert, weight, share in zip(tall.experts, tall.weights, even, strict=True):
        D = expert.to(dtype).contiguous() / size  # a transpose as it is would slow all that follows
        found = spiked_sides(D, tall.sizes, weight, k, dtype, share)
        if found is None:
            return None
        side, own = found
        sides.append(side)
        B.add_(own)
        wanted += dot(D, own)
        pull += float(own.norm())
    return sides, B, wanted, pull, size


@dataclass(frozen=True)
class KeptWork:
    """What a rule with a weight on both sides holds at its peak, all of it in float64: what is `carried` through the
    steps of conjugate gradients with what an application of either map makes, or before that what the last expert's
    sides come from.
    """

    keep: float
    pooled_keep: float
    carried: int  # tensors of the layer's size

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        n, m = sorted((rows, columns))
        k, pooled = (min(n, kept_directions(share, n)) for share in (self.keep, self.pooled_keep))
        K = experts * pooled
        sides = experts * k * (m + n) + (experts * pooled * (m + n) if pooled < k else 0)
        made = sides + 4 * m * n + 2 * m * k + 5 * n * n
        inverses = [size * size if size <= K else size * K + K * K for size in (m, n)]
        maps = sides + n * n + experts * k * m + sum(inverses)
        factored = maps + m * n + 2 * max(min(m, K), min(n, K)) ** 2
        solved = maps + self.carried * m * n + 3 * experts * k * n
        return 2 * max(made, factored, solved)


def kept_directions(keep: float, shorter: int) -> int:
    return max(_FEWEST, int(keep * shorter))


def reached(converged: bool, in_float64: bool) -> Status:
    """How conjugate gradients ended."""
    if not converged:
        return Status.NOT_CONVERGED
    return Status.FLOAT64 if in_float64 else Status.OK


def operations(experts: int, rows: int, columns: int, keep: float, pooled_keep: float, steps: int) -> int:
    """Of the system, and of so many steps of conjugate gradients with it."""
    m, n = max(rows, columns), min(rows, columns)
    k = min(n, kept_directions(keep, n))
    of_pooled = experts * min(n, kept_directions(pooled_keep, n))
    sides = m * n**2 + 9 * n**3 + 4 * m * n * k
    inverses = step = 0
    for size, other in ((m, n), (n, m)):
        formed, factored = sorted((size, of_pooled), reverse=True)
        inverses += formed * factored**2 + factored**3 // 3
        step += 4 * size * of_pooled * other + 2 * of_pooled**2 * other if of_pooled < size else 2 * size**2 * other
    step += 4 * experts * k * n * (m + k) + 2 * m * n**2
    return experts * sides + inverses + steps * step
