"""Leading singular vectors and polar factors from Gram matrices, without a full SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acemerge.linalg.gram import symmetric_product
from acemerge.linalg.known import Known, once
from acemerge.linalg.single import leading_in_float32
from acemerge.shapes import Float, Tensor

# A Gram matrix squares the spectrum: eigenvectors of singular values below this share of the largest are found
# from a second one, of what is left when the others are projected out.
_GRAM_RANGE = 1e-3
# Unit vectors of several matrices side by side inherit the noise of a direction over its size. Angles below this are
# none: the vectors share a direction.
SHARED = 2.0**-16
# A solve magnifies what noise leaves of a null direction by its condition.
_NULL_SOLVED = 2.0**-13


@dataclass(frozen=True)
class Singular:
    """Leading singular triplets of a matrix (out, in): `U` (out, r), `s` (k,) descending, `V` (in, r).

    Null directions have no singular vectors: r <= k counts the others.
    """

    U: Float[Tensor, "out r"]
    s: Float[Tensor, " k"]
    V: Float[Tensor, "in r"]

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def in_float64(self) -> bool:
        """Whether float32 was not asked for, or would not do."""
        return self.s.dtype == torch.float64

    def polar(self) -> Float[Tensor, "out in"]:
        """`U V^T`."""
        return self.U @ self.V.T

    def matrix(self) -> Float[Tensor, "out in"]:
        """`U diag(s) V^T`, the best approximation of rank k."""
        return (self.U * self.s[: self.rank]) @ self.V.T


def leading_singular(
    X: Float[Tensor, "out in"],
    k: int,
    floor: float = 0.0,
    share: float = 0.0,
    known: Known | None = None,
    in_float64: bool = False,
) -> Singular:
    """The top k singular triplets of X, by an eigen-decomposition of the smaller Gram matrix.

    In float64, but in float32 where X is that, large, the estimated error of U_k V_k^T is small enough and
    `in_float64` does not forbid it. The eigen-decomposition in float64 is kept in `known`, for the next who asks.
    Singular values of at most `floor`, at most `share` of the largest or at the level of rounding are taken for zero;
    so are those beyond the shorter side. What uses `U s V^T` alone needs neither: there a faint direction is faint.
    What uses U or V must not take noise for directions, and gives `rounding.NULL` for the share.
    """
    if X.shape[0] < X.shape[1]:
        flipped = leading_singular(X.T, k, floor, share, known, in_float64)
        return Singular(flipped.V, flipped.s, flipped.U)
    floor = max(floor, rounding_floor(X.double()))
    if not in_float64 and (found := leading_in_float32(X, k, floor, share)) is not None:
        return Singular(*found)
    given, X = X, X.double()
    s, V = _right_singular(X, k, floor, share, once(known, "eigenvectors of X^T X", given, lambda: _eigenvectors(X)))
    U = X @ V
    U /= s
    return Singular(U, torch.nn.functional.pad(s, (0, k - len(s))), V)


@dataclass(frozen=True)
class LeadingPolar:
    """`polar = U_k V_k^T` and `singular_values = s[:k]`, descending, of a matrix (out, in)."""

    polar: Float[Tensor, "out in"]
    singular_values: Float[Tensor, " k"]


def leading_polar(X: Float[Tensor, "out in"], k: int) -> LeadingPolar:
    """The product of the top k singular vectors of X, which comes from a solve, in X's type:
    `U_k V_k^T = X V_k diag(1/s) V_k^T`.

    Null directions, those below 2^-13 of the largest singular value, have no polar part and add nothing.
    """
    if X.shape[0] < X.shape[1]:
        flipped = leading_polar(X.T, k)
        return LeadingPolar(flipped.polar.T, flipped.singular_values)
    if (single := leading_in_float32(X, k, 0.0, _NULL_SOLVED)) is not None:
        U, s, V = single
        return LeadingPolar(U @ V.T, s)
    s, V = _right_singular(X.double(), k, 0.0, _NULL_SOLVED)
    found = torch.nn.functional.pad(s, (0, k - len(s)))
    if len(s) == 0 or s[-1] < _GRAM_RANGE * s[0]:  # a small s would magnify the rounding of X
        return LeadingPolar((X.double() @ (V / s) @ V.T).to(X.dtype), found)
    return LeadingPolar(X @ ((V / s) @ V.T).to(X.dtype), found)


def rounding_floor(X: Float[Tensor, "out in"]) -> float:
    """What a singular value of zero may come out as: `max(out, in) u ||X||_F`."""
    return float(X.norm() * max(X.shape) * torch.finfo(X.dtype).eps)


def _eigenvectors(X: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Of `X^T X`, and its eigenvalues, ascending."""
    gram = symmetric_product(X)
    del X  # what nobody else holds is let go of before the dearest step
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def _right_singular(
    X: Tensor, k: int, floor: float, share: float = 0.0, spectrum: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The singular values of X (m, n) above the floor and this share of the largest, k at most, and their right
    singular vectors (n, r). `spectrum` is that of X^T X, where it is known.
    """
    k = min(k, X.shape[1])
    values, vectors = _eigenvectors(X) if spectrum is None else spectrum
    del spectrum  # the vectors go when others are there
    found: list[tuple[Tensor, Tensor]] = []
    while True:
        s, n = values.flip(0).clamp_min(0).sqrt(), len(values)
        floor = max(floor, share * float(s[0]))
        good = min(k, int((s > max(floor, _GRAM_RANGE * float(s[0]))).sum()))
        found.append((s[:good], vectors[:, n - good :].flip(1)))  # a copy: a part of all vectors would keep all of them
        k, share = k - good, 0.0
        if good == 0 or k == 0:
            return torch.cat([s for s, _ in found]), torch.cat([V for _, V in found], 1)
        rest = vectors[:, : n - good]
        values, W = _eigenvectors(X @ rest)
        vectors = rest @ W


def inverse_root(G: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """`G^(-1/2)` of a symmetric positive semidefinite matrix, in float64. Null directions, of at most 2^-32 of the
    largest eigenvalue, are left out.
    """
    if len(G) == 0:
        return G.double()
    values, vectors = torch.linalg.eigh(G.double())
    kept = values > values[-1].clamp_min(0) * SHARED**2
    V = vectors[:, kept]
    root: Tensor = (V / values[kept].sqrt()) @ V.T
    return root


def polar(X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """`X (X^T X)^(-1/2)`, in X's type but made in float64: the roots of small eigenvalues magnify rounding.

    For a singular X it is the partial isometry between the spaces of the singular values above 2^-16 of the largest.
    """
    wide = X.double()
    return (wide @ inverse_root(symmetric_product(wide))).to(X.dtype)
