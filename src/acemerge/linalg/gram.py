"""Second moments of task vectors and the running sums of the normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from acemerge.shapes import Float, Tensor

# Below this width one product is faster than several block products.
_BLOCKED_FROM = 512
_BLOCKS = 4


def energies(deltas: Float[Tensor, "T *shape"]) -> Float[Tensor, " T"]:
    """`n_t = ||D_t||_F^2` for each expert: rows in the tensor's own type, their sum in float64."""
    flat = deltas[..., None] if deltas.ndim == 1 else deltas
    rows: Tensor = torch.linalg.vector_norm(flat, dim=-1).double()
    return rows.square().reshape(len(deltas), -1).sum(1)


def symmetric_product(x: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """`x^T x`."""
    return add_symmetric_product(x.new_zeros(x.shape[1], x.shape[1]), x, 1.0)


def add_symmetric_product(total: Float[Tensor, "n n"], x: Float[Tensor, "m n"], weight: float) -> Float[Tensor, "n n"]:
    """`total += weight x^T x` in place, for a symmetric `total`.

    Only block columns of the lower triangle are multiplied, the rest is mirrored.
    """
    n = x.shape[1]
    if n < _BLOCKED_FROM:
        return total.addmm_(x.T, x, alpha=weight)
    edges = [n * i // _BLOCKS for i in range(_BLOCKS + 1)]
    for lo, hi in pairwise(edges):
        total[lo:, lo:hi].addmm_(x[:, lo:].T, x[:, lo:hi], alpha=weight)
        total[lo:hi, hi:] = total[hi:, lo:hi].T
    return total


@dataclass(frozen=True)
class NormalEquations:
    """The running sums `A = sum_t w_t Z_t^T Z_t` and `B = sum_t w_t X_t Z_t^T Z_t`.

    Whatever the number of experts, no more than these two matrices and one product exist at once.
    """

    gram: Float[Tensor, "in in"]
    target: Float[Tensor, "out in"]

    @classmethod
    def zeros_like(cls, delta: Float[Tensor, "out in"], dtype: torch.dtype) -> NormalEquations:
        out_features, in_features = delta.shape
        return cls(
            gram=torch.zeros(in_features, in_features, dtype=dtype, device=delta.device),
            target=torch.zeros(out_features, in_features, dtype=dtype, device=delta.device),
        )

    def add(self, x: Float[Tensor, "out in"], z: Float[Tensor, "out in"], weight: float) -> None:
        """Add one expert with target `x`, source of the second moment `z` and weight `w_t`, in place."""
        out_features, in_features = x.shape
        if out_features < in_features:  # x (z^T z) = (x z^T) z: cheaper, and no second moment is formed
            add_symmetric_product(self.gram, z, weight)
            left = symmetric_product(z.T) if x is z else x @ z.T  # (out, out)
            self.target.addmm_(left, z, alpha=weight)
        else:
            second_moment = symmetric_product(z)  # (in, in)
            self.gram.add_(second_moment, alpha=weight)
            self.target.addmm_(x, second_moment, alpha=weight)
