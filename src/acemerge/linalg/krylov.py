"""The largest singular values of a matrix, from a few products with it."""

from __future__ import annotations

import torch

from acemerge.linalg.spectral import Singular, rounding_floor
from acemerge.shapes import Float, Tensor

# A shorter side up to this is done exactly: there a few products save nothing.
_EXACT = 48
_WIDTH, _STEPS = 4, 10


def spectral_norms(X: Float[Tensor, "P out in"]) -> Float[Tensor, " P"]:
    """`||X_p||_2` in float64, from below: never too large, too small by a few per cent at most where no direction
    stands out and by rounding where one does.

    The largest singular value on the Krylov space of `X^T X`, from 4 random directions in 10 steps (Musco and Musco,
    arXiv 1504.05477): some `90 out in` operations. Exact where a side has 48 or less. The start is always the same.
    """
    if min(X.shape[1:]) <= _EXACT:
        exact: Tensor = torch.linalg.matrix_norm(X.double(), 2)
        return exact
    Q = _space(X, _WIDTH, _STEPS)
    found: Tensor = torch.linalg.matrix_norm((X @ Q.to(X)).double(), 2)
    return found


def leading_values(X: Float[Tensor, "out in"], k: int) -> Float[Tensor, " k"]:
    """The k largest singular values, descending, in float64, from below as `spectral_norms`: k + 8 directions."""
    Q = _leading_space(X, k)
    found: Tensor = torch.linalg.svdvals((X @ Q.to(X)).double())
    return found[:k]


def leading_triplets(X: Float[Tensor, "out in"], k: int) -> Singular:
    """The same with their singular vectors; what is at the level of rounding is taken for zero."""
    Q = _leading_space(X, k)
    U, s, Vh = torch.linalg.svd((X @ Q.to(X)).double(), full_matrices=False)
    U, s, V = U[:, :k], s[:k], Q @ Vh.mT[:, :k]
    rank = int((s > rounding_floor(X)).sum())
    return Singular(U[:, :rank], s, V[:, :rank])


def _leading_space(X: Float[Tensor, "out in"], k: int) -> Float[Tensor, "in n"]:
    return _space(X[None], k + 8, 3)[0]


def _space(X: Float[Tensor, "P out in"], width: int, steps: int) -> Float[Tensor, "P in k"]:
    """An orthonormal basis of the Krylov space of `X^T X` from `width` directions, in float64."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(X.shape[2], width, generator=generator).to(X).expand(len(X), -1, -1)
    space = []
    for _ in range(steps):
        V = torch.linalg.qr(X.mT @ (X @ V)).Q
        space.append(V)
    found: Tensor = torch.linalg.qr(torch.cat(space, 2).double()).Q
    return found
