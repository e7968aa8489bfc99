"""Second moments of task vectors and the running sums of the normal equations."""

from __future__ import annotations

import torch

from acemerge.shapes import Float, Tensor

# A symmetric product is halved into blocks of a quarter of it, an eighth where it is large: smaller ones lose more
# speed than the spared half of the triangle is worth. Below the first width one product is fastest.
_SPLIT_FROM = 512
_SPLIT_FINER_FROM = 2048


def energies(deltas: Float[Tensor, "T *shape"]) -> Float[Tensor, " T"]:
    """`n_t = ||D_t||_F^2` for each expert: rows in the tensor's own type, their sum in float64."""
    flat = deltas[..., None] if deltas.ndim == 1 else deltas
    rows: Tensor = torch.linalg.vector_norm(flat, dim=-1).double()
    return rows.square().reshape(len(deltas), -1).sum(1)


def symmetric_product(x: Float[Tensor, "m n"], out: Float[Tensor, "n n"] | None = None) -> Float[Tensor, "n n"]:
    """`x^T x`, into `out` where given."""
    product = x.new_empty(x.shape[1], x.shape[1]) if out is None else out
    add_lower(product, x, 1.0, 0.0)
    return mirror(product)


def add_lower(total: Float[Tensor, "n n"], x: Float[Tensor, "m n"], weight: float, beta: float = 1.0) -> None:
    """`total = beta total + weight x^T x` in place, in blocks that cover the lower triangle; see `mirror`."""
    _add_lower(total, x, weight, beta, _leaf(x.shape[1]))


def mirror(total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Complete what `add_lower` left out, in place."""
    _mirror(total, _leaf(len(total)))
    return total


def _leaf(n: int) -> int:
    if n < _SPLIT_FROM:
        return n
    return -(-n // (4 if n < _SPLIT_FINER_FROM else 8))


def _add_lower(total: Tensor, x: Tensor, weight: float, beta: float, leaf: int) -> None:
    n = x.shape[1]
    if n <= leaf:
        total.addmm_(x.T, x, alpha=weight, beta=beta)
        return
    half = n // 2
    _add_lower(total[:half, :half], x[:, :half], weight, beta, leaf)
    _add_lower(total[half:, half:], x[:, half:], weight, beta, leaf)
    total[half:, :half].addmm_(x[:, half:].T, x[:, :half], alpha=weight, beta=beta)


def _mirror(total: Tensor, leaf: int) -> None:
    n = len(total)
    if n <= leaf:
        return
    half = n // 2
    _mirror(total[:half, :half], leaf)
    _mirror(total[half:, half:], leaf)
    total[:half, half:] = total[half:, :half].T


class NormalEquations:
    """The running sums `A = sum_t w_t Z_t^T Z_t` and `B = sum_t X_t (w_t Z_t^T Z_t + l_t I)`.

    Whatever the number of experts, no more than these two matrices and one second moment exist at once.
    """

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self._gram = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._target = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        side = min(out_features, in_features)
        self._moment = torch.empty(side, side, dtype=dtype, device=device)  # of one expert at a time

    def add(self, x: Float[Tensor, "out in"], z: Float[Tensor, "out in"], weight: float, pull: float = 0.0) -> None:
        """Add one expert: target `x`, source of the second moment `z`, weight `w_t` and pull `l_t`.

        A pull needs `x` and `z` to be the same; an expert of no weight adds nothing.
        """
        out_features, in_features = x.shape
        if weight == 0:
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
            self._target.addmm_(x, second_moment, alpha=weight)

    def add_moment(self, x: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], weight: float) -> None:
        """Add one expert by its second moment: target `x`, weight `w_t`. One of no weight adds nothing."""
        if weight == 0:
            return
        self._gram.add_(moment, alpha=weight)
        self._target.addmm_(x, moment, alpha=weight)

    def sums(self) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"]]:
        """A and B. The end: nothing can be added after it."""
        del self._moment
        out_features, in_features = self._target.shape
        return mirror(self._gram) if out_features < in_features else self._gram, self._target
