"""Solving `M A = B` with a symmetric positive (semi)definite A, and how far to trust the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.linalg import vector_norm

from acemerge.linalg.gram import add_lower
from acemerge.linalg.rounding import NULL
from acemerge.shapes import Float, Int, Tensor

# A float32 answer whose estimated relative error is above this is computed again in float64: sooner in small
# layers, where that costs nothing.
ERROR_TOLERANCE = 1e-4
SMALL_ERROR_TOLERANCE = 1e-5
SMALL = 512
_PROBES = 4
# Sums round more than once. Measured over 64 x 64 to 768 x 3072, 2 to 8 experts and condition 1 to 1e5, the
# true error was 1.4 to 7 times the first-order estimate: this keeps the estimate an upper bound.
_ROUNDING_GROWTH = 8.0
# A factor may come out of pure rounding: from this share of 1 / (n u) on, a condition is taken for infinite.
_SINGULAR = 0.1
_SMALLEST = 1e-30
_BLOCK = 512  # a smaller factor is LAPACK's


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a system matrix A once it is factored.

    `regular`: it has a Cholesky factor and is well enough conditioned for it. `rank` counts the eigenvalues that were
    kept, `condition` is an estimate, `norm` estimates `||A^(-1)||_F`.
    """

    regular: bool
    condition: float
    rank: int
    norm: float

    def error(self, A: Float[Tensor, "in in"], B: Float[Tensor, "out in"], Y: Float[Tensor, "out in"]) -> float:
        """An estimate from above of what rounding made of `Y = B A^(-1)`, relative to it; 0 in float64, where nothing
        wider is left.
        """
        if A.dtype != torch.float32:
            return 0.0
        return rounding_error(A, B, Y, self.norm) if self.regular else float("inf")


def error_tolerance(n: int) -> float:
    """The largest estimated error of a solution with n columns that is let be."""
    return SMALL_ERROR_TOLERANCE if n <= SMALL else ERROR_TOLERANCE


@dataclass(frozen=True)
class Inverse:
    """`A^(-1)` in factored form: `inverse(B)` is `B A^(-1)`."""

    apply: Callable[[Tensor], Tensor]
    diagnosis: Diagnosis

    def __call__(self, B: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return self.apply(B)


def invert(A: Float[Tensor, "in in"]) -> Inverse:
    """The inverse by one Cholesky factor.

    Where A is not positive definite to working precision: none in float32, so that the caller forms A
    again in float64; in float64 the pseudo-inverse, which is the limit of a vanishing ridge for right-hand
    sides in the range of A, as sums of Gram matrices have.
    """
    L = cholesky(A)
    if L is not None:
        condition, norm = (estimate.item() for estimate in spectrum_estimates(A, L))
        # In float32 `error` decides, from the right-hand side too.
        if A.dtype == torch.float32 or condition < largest_condition(A):
            return Inverse(lambda B: solve(L, B), Diagnosis(True, condition, len(A), norm))
    if A.dtype == torch.float32:
        return Inverse(lambda B: B, Diagnosis(False, float("inf"), 0, float("inf")))
    return _pseudo_inverse(A)


def cholesky(A: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """The lower L of `A = L L^T`, None where A is not positive definite to working precision.

    By halves, so that most of the work is products; LAPACK's own factor is a third slower from 1,000 on.
    """
    L = A.clone()
    if not _factor(L):
        return None
    return L.tril_() if bool(torch.isfinite(L.diagonal()).all()) else None


def _factor(L: Tensor) -> bool:
    """Factor the lower triangle in place; what lies above it is left as it comes."""
    n = len(L)
    if n < _BLOCK:
        factor, info = torch.linalg.cholesky_ex(L)
        L.copy_(factor)
        return not info.item()
    half = n // 2
    below = L[half:, :half]
    if not _factor(L[:half, :half]):
        return False
    below.copy_(torch.linalg.solve_triangular(L[:half, :half].T, below, upper=True, left=False))
    add_lower(L[half:, half:], below.T, -1.0)
    return _factor(L[half:, half:])


def largest_condition(A: Float[Tensor, "*P n n"]) -> float:
    """The estimated condition from which on A may be singular. A is a Gram matrix, where `NULL` counts twice."""
    return min(_SINGULAR / (torch.finfo(A.dtype).eps * A.shape[-1]), NULL**-2)


def solve(L: Float[Tensor, "*P n n"], B: Float[Tensor, "*#P m n"]) -> Float[Tensor, "*P m n"]:
    """`B (L L^T)^(-1)`, from the left on the transposes, as LAPACK stores them: a fifth faster.

    `torch.cholesky_solve` would copy L.
    """
    half = torch.linalg.solve_triangular(L, B.mT, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(L.mT, half, upper=True, out=half).mT
    return solved


def _pseudo_inverse(A: Tensor) -> Inverse:
    """`A^+` from the eigen-decomposition. Left out are eigenvalues below 2^-42 of the largest, directions below 2^-21
    in what A is the Gram matrix of: divided by, rounding there would be all of the result.
    """
    values, vectors = torch.linalg.eigh(A)
    kept = values > values[-1].clamp_min(0) * max(NULL**2, torch.finfo(A.dtype).eps * A.shape[0])
    values, vectors = values[kept], vectors[:, kept]  # (rank,), (in, rank)
    condition = float(values[-1] / values[0]) if len(values) else float("inf")
    norm = vector_norm(1 / values).item()
    diagnosis = Diagnosis(False, condition, len(values), norm)
    return Inverse(lambda B: (B @ vectors / values) @ vectors.T, diagnosis)


def with_rank_one(
    Y: Float[Tensor, "*P out in"], row: Float[Tensor, "*P in"], ones: Float[Tensor, " in"] | None = None
) -> Float[Tensor, "*P out in"]:
    """`B (A + 1 c^T)^(-1)` from `Y = B A^(-1)` and `row = c^T A^(-1)`, by Sherman-Morrison:
    `Y - (Y 1) row / (1 + row 1)`. The prior P = 1 c^T adds the row c to every row of A.
    `ones` is 1 in other coordinates than the layer's own.
    """
    sums, total = (Y.sum(-1), row.sum(-1)) if ones is None else (Y @ ones, row @ ones)
    change = sums[..., None] * (row / (1 + total[..., None]))[..., None, :]
    return torch.sub(Y, change, out=change)


def spectrum_estimates(
    A: Float[Tensor, "*P n n"], L: Float[Tensor, "*P n n"]
) -> tuple[Float[Tensor, "*P"], Float[Tensor, "*P"]]:
    """Estimates of `cond(A)` and `||A^(-1)||_F` for A = L L^T, from a few solves with fixed sign vectors."""
    probes = _signs(A.shape[-1]).to(dtype=A.dtype, device=A.device)  # (4, n)
    solved = solve(L, probes)  # (*P, 4, n)
    inverse_norm = vector_norm(solved, dim=(-2, -1)) / _PROBES**0.5  # Hutchinson: E ||g A^(-1)||^2 = ||A^(-1)||_F^2
    for _ in range(2):
        solved = solve(L, _unit_rows(solved))
        probes = _unit_rows(probes) @ A
    largest = vector_norm(_unit_rows(probes) @ A, dim=-1).amax(-1)
    smallest_inverse = vector_norm(solved, dim=-1).amax(-1)
    return largest * smallest_inverse, inverse_norm


@lru_cache(maxsize=64)
def _signs(n: int) -> Int[Tensor, "4 n"]:
    signs: Tensor = torch.randint(0, 2, (_PROBES, n), generator=torch.Generator().manual_seed(n)).mul_(2).sub_(1)
    return signs


def _unit_rows(rows: Float[Tensor, "*P m n"]) -> Float[Tensor, "*P m n"]:
    units: Tensor = rows / vector_norm(rows, dim=-1, keepdim=True).clamp_min(_SMALLEST)
    return units


def rounding_error(
    A: Float[Tensor, "in in"], B: Float[Tensor, "out in"], Y: Float[Tensor, "out in"], inverse_norm: float
) -> float:
    """Estimate of `||dY|| / ||Y||` for `Y = B A^(-1)` when A and B carry independent rounding errors.

    `dY = (dB - Y dA) A^(-1)`; with entries of dA, dB of size u times the root mean square entry of A, B,
    `||dB A^(-1)||_F ~ u rms(B) sqrt(out) ||A^(-1)||_F`, and the like for `Y dA`.
    """
    norm_Y = vector_norm(Y).item()
    if norm_Y == 0:
        return 0.0
    rms_A, rms_B = (vector_norm(matrix).item() / matrix.numel() ** 0.5 for matrix in (A, B))
    unit = torch.finfo(A.dtype).eps / 2
    return float(_ROUNDING_GROWTH * unit * inverse_norm * (rms_B * B.shape[0] ** 0.5 / norm_Y + rms_A))
