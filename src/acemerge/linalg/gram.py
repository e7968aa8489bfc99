"""Second moments of task vectors and the running sums of the normal equations."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from acemerge.shapes import Float, Tensor

# A symmetric product is made in four rows of blocks, where it is large by halves down to an eighth: smaller ones lose
# more speed than the spared half of the triangle is worth. Below the first width one product is fastest.
_SPLIT_FROM = 512
_HALVED_FROM = 2048
_SQUARED = (1e-15, 1e15)  # norms whose squares float32 holds, those of their entries too


def energies(deltas: Float[Tensor, "T *shape"]) -> Float[Tensor, " T"]:
    """`n_t = ||D_t||_F^2` for each expert: rows in the tensor's own type where that holds their squares, the rest in
    float64, which is slower.
    """
    flat = deltas[..., None] if deltas.ndim == 1 else deltas
    rows: Tensor = torch.linalg.vector_norm(flat, dim=-1).double()
    places = (rows < _SQUARED[0]) | ~(rows < _SQUARED[1])  # NaN too
    if places.any():
        rows[places] = torch.linalg.vector_norm(flat[places], dim=-1, dtype=torch.float64)
    return rows.square().reshape(len(deltas), -1).sum(1)


def symmetric_product(x: Float[Tensor, "m n"], out: Float[Tensor, "n n"] | None = None) -> Float[Tensor, "n n"]:
    """`x^T x`, into `out` where given."""
    product = x.new_empty(x.shape[1], x.shape[1]) if out is None else out
    add_lower(product, x, 1.0, 0.0)
    return mirror(product)


def add_lower(total: Float[Tensor, "n n"], x: Float[Tensor, "m n"], weight: float, beta: float = 1.0) -> None:
    """`total = beta total + weight x^T x` in place, in blocks that cover the lower triangle; see `mirror`."""
    for rows, columns in _blocks(len(total)):
        total[rows, columns].addmm_(x[:, rows].T, x[:, columns], alpha=weight, beta=beta)


def mirror(total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Complete what `add_lower` left out, in place. The result is symmetric to the bit, which a product need not be."""
    for rows, columns in _blocks(len(total)):
        left = slice(columns.start, min(columns.stop, rows.start))
        total[left, rows] = total[rows, left].T
        if columns.stop == rows.stop:  # else it lies off the diagonal
            square = total[rows, rows]
            square.copy_(square.tril().add_(square.tril(-1).T))
    return total


@lru_cache(maxsize=64)
def _blocks(n: int) -> list[tuple[slice, slice]]:
    """Rows and columns of blocks that cover the lower triangle of n x n: each ends with its rows, or before them."""
    if n < _SPLIT_FROM:
        return [(slice(0, n), slice(0, n))]
    if n < _HALVED_FROM:
        edges = [n * i // 4 for i in range(5)]
        return [(slice(a, b), slice(0, b)) for a, b in pairwise(edges)]
    return _halved(0, n, -(-n // 8))


def _halved(start: int, stop: int, leaf: int) -> list[tuple[slice, slice]]:
    if stop - start <= leaf:
        return [(slice(start, stop), slice(start, stop))]
    half = (start + stop) // 2
    across = [(slice(half, stop), slice(start, half))]
    return _halved(start, half, leaf) + _halved(half, stop, leaf) + across


class NormalEquations:
    """The running sums `A = sum_t w_t Z_t^T Z_t` and `B = sum_t X_t (w_t Z_t^T Z_t + l_t I)`.

    Whatever the number of experts, no more than these two matrices and one second moment exist at once.
    """

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self._gram = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._target = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        side = min(out_features, in_features)
        self._moment = torch.empty(side, side, dtype=dtype, device=device)  # of one expert at a time

    def add(
        self,
        x: Float[Tensor, "out in"],
        z: Float[Tensor, "out in"],
        weight: float,
        pull: float = 0.0,
        origin: Float[Tensor, "out in"] | None = None,
        room: Float[Tensor, "out in"] | None = None,
    ) -> None:
        """Add one expert: target `x`, source of the second moment `z`, weight `w_t` and pull `l_t`.

        A pull needs `x` and `z` to be the same; an expert of no weight adds nothing. With an origin, which is not for
        `out < in`, the target is `x - origin`, made in the room, which may be x or z, where given; and where x is the
        origin itself A alone grows.
        """
        out_features, in_features = x.shape
        if weight == 0:
            return
        if x is origin:
            add_lower(self._gram, z, weight)
            return
        if out_features < in_features:  # x (z^T z) = (x z^T) z: cheaper, and no second moment is formed
            add_lower(self._gram, z, weight)
            left = symmetric_product(z.T, self._moment) if x is z else torch.mm(x, z.T, out=self._moment)
            left.diagonal().add_(pull / weight)
            self._target.addmm_(left, z, alpha=weight)
        else:
            second_moment = symmetric_product(z, self._moment)  # (in, in)
            self._gram.add_(second_moment, alpha=weight)
            second_moment.diagonal().add_(pull / weight)
            target = x if origin is None else torch.sub(x, origin, out=room)
            self._target.addmm_(target, second_moment, alpha=weight)

    def add_moment(
        self,
        x: Float[Tensor, "out in"],
        moment: Float[Tensor, "in in"],
        weight: float,
        origin: Float[Tensor, "out in"] | None = None,
        room: Float[Tensor, "out in"] | None = None,
    ) -> None:
        """Add one expert by its second moment: target `x`, weight `w_t`, origin and room as in `add`."""
        if weight == 0:
            return
        self._gram.add_(moment, alpha=weight)
        if x is not origin:
            target = x if origin is None else torch.sub(x, origin, out=room)
            self._target.addmm_(target, moment, alpha=weight)

    def sums(self) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"]]:
        """A and B. The end: nothing can be added after it."""
        del self._moment
        return mirror(self._gram), self._target
