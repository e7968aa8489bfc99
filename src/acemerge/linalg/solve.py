"""Solvers for `M A = B` with a symmetric positive (semi)definite A, and how far to trust them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from acemerge.shapes import Float, Tensor

Status = Literal["ok", "unreliable", "pseudo-inverse"]

# A float32 answer whose estimated relative error is above this is computed again in float64.
ERROR_TOLERANCE = 1e-5
_PROBES = 4
# Sums round more than once. Measured over 64 x 64 to 768 x 3072, 2 to 8 experts and condition 1 to 1e5, the
# true error was 1.4 to 7 times the first-order estimate: this keeps the estimate an upper bound.
_ROUNDING_GROWTH = 8.0


@dataclass(frozen=True)
class Solution:
    """`value` (out, in) solves `M A = B`; `error` estimates its relative error in the Frobenius norm."""

    value: Float[Tensor, "out in"]
    status: Status
    condition: float
    rank: int
    error: float

    @property
    def trusted(self) -> bool:
        return self.status != "unreliable"


def solve_right(
    A: Float[Tensor, "in in"], B: Float[Tensor, "out in"], prior: Float[Tensor, " in"] | None = None
) -> Solution:
    """`B (A + 1 c^T)^(-1)` with `c = prior`: the prior adds the row c to every row of A.

    A is symmetric positive definite, so one Cholesky factor serves; the prior is rank one, so
    Sherman-Morrison adds one right-hand side:
    `B (A + 1 c^T)^(-1) = Y - (Y 1)(c^T A^(-1)) / (1 + c^T A^(-1) 1)`, `Y = B A^(-1)`.

    In float32 the status is "unreliable" where the factor fails or the estimated error is above
    `ERROR_TOLERANCE`: the caller forms A and B again in float64. In float64 a singular A is replaced by its
    pseudo-inverse, the limit of a vanishing ridge when B and c lie in its range, as sums of Gram matrices do.
    """
    L, info = torch.linalg.cholesky_ex(A)
    if info.item() == 0 and bool(torch.isfinite(L.diagonal()).all()):
        return _solve_cholesky(A, B, prior, L)
    if A.dtype == torch.float32:
        return Solution(B, "unreliable", float("inf"), 0, float("inf"))
    return _solve_pseudo_inverse(A, B, prior)


def _solve_cholesky(A: Tensor, B: Tensor, prior: Tensor | None, L: Tensor) -> Solution:
    Y = torch.cholesky_solve(B.T, L).T  # (out, in)
    condition, inverse_norm = _spectrum_estimates(A, L)
    error = _rounding_error(A, B, Y, inverse_norm)
    status: Status = "ok"
    if A.dtype == torch.float32 and not error <= ERROR_TOLERANCE:
        status = "unreliable"
    if prior is not None:
        Y = _with_prior(Y, torch.cholesky_solve(prior[:, None], L)[:, 0])
    return Solution(Y, status, condition, A.shape[0], error)


def _solve_pseudo_inverse(A: Tensor, B: Tensor, prior: Tensor | None) -> Solution:
    """`A^+` from the eigen-decomposition, eigenvalues at rounding level left out."""
    values, vectors = torch.linalg.eigh(A)
    kept = values > values[-1].clamp_min(0) * torch.finfo(A.dtype).eps * A.shape[0]
    values, vectors = values[kept], vectors[:, kept]  # (rank,), (in, rank)
    inverse = (vectors / values) @ vectors.T
    Y = B @ inverse
    if prior is not None:
        Y = _with_prior(Y, prior @ inverse)
    condition = (values[-1] / values[0]).item() if len(values) else float("inf")
    return Solution(Y, "pseudo-inverse", float(condition), len(values), float("nan"))


def _with_prior(Y: Float[Tensor, "out in"], row: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Sherman-Morrison, with `row = c^T A^(-1)`."""
    return Y - torch.outer(Y.sum(1), row / (1 + row.sum()))


def _spectrum_estimates(A: Tensor, L: Tensor) -> tuple[float, float]:
    """Estimates of `cond(A)` and `||A^(-1)||_F` for A = L L^T, from a few solves with fixed sign vectors."""
    n = A.shape[0]
    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n, _PROBES), generator=generator).mul_(2).sub_(1)
    probes = signs.to(dtype=A.dtype, device=A.device)  # (in, 4)
    solved = torch.cholesky_solve(probes, L)  # (in, 4)
    inverse_norm = (solved.norm() / _PROBES**0.5).item()  # Hutchinson: E ||A^(-1) g||^2 = ||A^(-1)||_F^2
    for _ in range(2):
        solved = torch.cholesky_solve(solved / solved.norm(dim=0).clamp_min(1e-300), L)
        probes = A @ (probes / probes.norm(dim=0).clamp_min(1e-300))
    largest = (A @ (probes / probes.norm(dim=0))).norm(dim=0).max()
    smallest_inverse = solved.norm(dim=0).max()
    return float(largest * smallest_inverse), float(inverse_norm)


def _rounding_error(A: Tensor, B: Tensor, Y: Tensor, inverse_norm: float) -> float:
    """First-order estimate of `||dY|| / ||Y||` when A and B carry independent rounding errors.

    `dY = (dB - Y dA) A^(-1)`; with entries of dA, dB of size u times the root mean square entry of A, B,
    `||dB A^(-1)||_F ~ u rms(B) sqrt(out) ||A^(-1)||_F`, and the like for `Y dA`.
    """
    unit = torch.finfo(A.dtype).eps / 2
    rms_A: float = (A.norm() / A.numel() ** 0.5).item()
    rms_B: float = (B.norm() / B.numel() ** 0.5).item()
    norm_Y: float = Y.norm().item()
    if norm_Y == 0:
        return 0.0
    return float(_ROUNDING_GROWTH * unit * inverse_norm * (rms_B * B.shape[0] ** 0.5 / norm_Y + rms_A))
