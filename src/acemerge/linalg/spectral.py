"""Leading singular subspaces without a full SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acemerge.linalg.gram import symmetric_product
from acemerge.shapes import Float, Tensor

# A Gram matrix squares the spectrum: below this ratio s_k / s_1 its eigenvectors lose too many digits.
_GRAM_RANGE = 1e-5


@dataclass(frozen=True)
class LeadingPolar:
    """`polar = U_k V_k^T` and `singular_values = s[:k]`, descending, of a matrix (out, in)."""

    polar: Float[Tensor, "out in"]
    singular_values: Float[Tensor, " k"]


def leading_polar(X: Float[Tensor, "out in"], k: int) -> LeadingPolar:
    """The top k singular values of X and the product of their singular vectors.

    By the eigen-decomposition of the smaller Gram matrix, in float64:
    `U_k V_k^T = X V_k diag(1/s) V_k^T`. A spectrum too wide for that goes through a full SVD.
    Null directions have no polar part and add nothing.
    """
    if X.shape[0] < X.shape[1]:
        flipped = leading_polar(X.T, k)
        return LeadingPolar(flipped.polar.T, flipped.singular_values)
    values, vectors = torch.linalg.eigh(symmetric_product(X.double()))  # ascending
    s = values[-k:].flip(0).clamp_min(0).sqrt()
    V = vectors[:, -k:].flip(1)  # (in, k)
    if not s[-1] > _GRAM_RANGE * s[0]:
        return _leading_polar_svd(X, k)
    polar = X @ ((V / s) @ V.T).to(X.dtype)
    return LeadingPolar(polar, s.to(X.dtype))


def _leading_polar_svd(X: Tensor, k: int) -> LeadingPolar:
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rank = int((s[:k] > s[0] * max(X.shape) * torch.finfo(torch.float64).eps).sum())
    return LeadingPolar((U[:, :rank] @ Vh[:rank]).to(X.dtype), s[:k].to(X.dtype))
