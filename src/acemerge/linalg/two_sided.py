"""Least squares with a weight on the outputs as well as on the inputs, one pair for each expert:

    H(X) = sum_t A_t X S_t + l X,   A_t (out, out), S_t (in, in), positive semidefinite

H has (out in)^2 entries and is only ever applied. What it is solved with are conjugate gradients, preconditioned by the
nearest thing that comes apart into the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from acemerge.linalg.gram import add_lower, mirror, symmetric_product
from acemerge.linalg.solve import invert
from acemerge.shapes import Float, Tensor

Map = Callable[[Tensor], Tensor]  # of matrices (out, in) to such, linear


@dataclass(frozen=True)
class Sides:
    """One expert's A and S: `left` and `right` are they themselves where `formed`, else P (out, r) and Q (in, r) with
    `A = P P^T` and `S = Q Q^T`. `pull` is `||A D S||_F` for the update D that they are made of.
    """

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "in r2"]
    formed: bool
    pull: float

    def around(self, X: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """`A X S`."""
        if self.formed:
            return self.left @ (X @ self.right)
        return self.left @ ((self.left.T @ X @ self.right) @ self.right.T)


def root_sides(D: Float[Tensor, "out in"], sizes: tuple[int, int], weight: float, dtype: torch.dtype) -> Sides:
    """`A = sqrt(w) (D D^T)^(1/2)` and `S = sqrt(w) (D^T D)^(1/2)`, each over its mean eigenvalue, the trace over its
    size in `sizes`. D is not zero and has no more columns than rows.

    With `D = U diag(s) V^T` the roots are `U diag(s) U^T` and `V diag(s) V^T`. V and s come from the smaller Gram
    matrix in float64; what its rounding hides, below 1e-7 of the largest s or so, is left out.
    """
    values, V = torch.linalg.eigh(symmetric_product(D.double()))
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    s, V = values[kept].sqrt(), V[:, kept]
    out, columns = (weight**0.5 * size / float(s.sum()) for size in sizes)  # mean eigenvalue one
    P = D.to(dtype) @ (V * (out / s).sqrt()).to(dtype)  # U sqrt(s) = D V / sqrt(s)
    Q = (V * (columns * s).sqrt()).to(dtype)
    pull = out * columns * float(s.pow(3).norm())
    if not forms_sides(D.shape[0], D.shape[1], len(s)):
        return Sides(P, Q, False, pull)
    return Sides(symmetric_product(P.T), symmetric_product(Q.T), True, pull)


def forms_sides(rows: int, columns: int, rank: int) -> bool:
    """Whether `A X S` takes fewer operations with A and S than with their factors."""
    return rows * columns * (rows + columns) < 2 * rank * columns * (rows + rank)


def preconditioner(sides: Sequence[Sides], ridge: float) -> Map:
    """`X -> (sum_t A_t / sqrt(T) + sqrt(l) I)^(-1) X (sum_t S_t / sqrt(T) + sqrt(l) I)^(-1)`.

    The inverse of H if all A_t were alike and all S_t, up to the cross terms of the two dampings (as Martens and Grosse
    2015, arXiv 1503.05671, for the Fisher matrix of a layer): two Cholesky factors, no eigenvectors.
    """
    of_rows = _damped_inverse([(one.left, one.formed) for one in sides], ridge**0.5)
    of_columns = _damped_inverse([(one.right, one.formed) for one in sides], ridge**0.5)
    return lambda X: of_columns(of_rows(X.T).T)


def _damped_inverse(parts: Sequence[tuple[Tensor, bool]], damping: float) -> Map:
    """`X -> X (sum_t B_t / sqrt(T) + damping I)^(-1)`, each B_t given itself, if formed, or by its F with `B = F F^T`.

    Where all are given by factors that together have fewer columns than rows, in the space of these columns (Woodbury).
    """
    T, n = len(parts), len(parts[0][0])
    if not any(formed for _, formed in parts) and sum(F.shape[1] for F, _ in parts) < n:
        F = torch.cat([F for F, _ in parts], 1).mul_(T**-0.25)
        K = symmetric_product(F)
        K.diagonal().add_(damping)
        inner = invert(K)
        return lambda X: (X - inner(X @ F) @ F.T).div_(damping)
    total = parts[0][0].new_zeros(n, n)
    for part, formed in parts:
        if not formed:
            add_lower(total, part.T, T**-0.5)
    mirror(total)
    for part, formed in parts:
        if formed:
            total.add_(part, alpha=T**-0.5)
    total.diagonal().add_(damping)
    return invert(total)


@dataclass(frozen=True)
class Descent:
    """Where conjugate gradients ended: X, after so many steps, with this residual relative to that of X = 0."""

    X: Float[Tensor, "out in"]
    steps: int
    residual: float


def conjugate_gradients(
    apply: Map, precondition: Map, B: Float[Tensor, "out in"], steps: int, tol: float, floor: float = 0.0
) -> Descent:
    """Solve `H(X) = B` from X = 0 until `||B - H(X)||_F <= tol ||B||_F`, in `steps` steps at most; `apply` is H.

    A right-hand side of no more than `floor` in norm is rounding and taken for zero. H and the preconditioner are
    symmetric and positive definite.
    """
    X, size = torch.zeros_like(B), float(B.norm())
    if size <= floor:
        return Descent(X, 0, 0.0)
    R = B / size  # squares of very small or large entries would leave the range of float32
    direction = precondition(R)
    descent = _dot(R, direction)
    taken, residual = 0, 1.0
    while residual > tol and taken < steps:
        image = apply(direction)
        length = descent / _dot(direction, image)
        X.add_(direction, alpha=length)
        R.sub_(image, alpha=length)
        taken, residual = taken + 1, float(R.norm())
        Z = precondition(R)
        before, descent = descent, _dot(R, Z)
        direction = torch.add(Z, direction, alpha=descent / before)  # a preconditioner may return R itself
    return Descent(X.mul_(size), taken, residual)


def _dot(X: Tensor, Y: Tensor) -> float:
    return float(torch.dot(X.flatten(), Y.flatten()))
