"""The one solution behind the covariance family: a weighted least-squares fit of all experts' updates.

    M = (sum_t X_t (a_t G_t + l_t I)) (sum_t a_t G_t + e I + 1 c^T)^(-1),   G_t = Z_t^T Z_t

A rule chooses the source Z_t of its estimate of task t's second moment, the target X_t, the weights a_t, and
the regulariser: a ridge e, its pull l_t towards the targets, and the prior row c. Where second moments were measured,
the sources are the G_t themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from acemerge.linalg.gram import NormalEquations, symmetric_product
from acemerge.linalg.problem import Experts, Problem
from acemerge.linalg.refine import InInputs, InRows, Residual, probed_error, refined
from acemerge.linalg.solve import SMALL, Diagnosis, Inverse, error_tolerance, invert, with_rank_one
from acemerge.shapes import Float, Tensor

_WIDE = 2  # times as many columns as rows from which refinement takes less than a repetition
_HOPELESS = 0.25  # estimated error from which on neither a look nor a correction is tried


@dataclass(frozen=True)
class Fit:
    """The solution M, what is known of its system matrix and whether M is accurate enough.

    `by`: in the type that was asked for; corrected by residuals in float64; or all of it in float64.
    `residual` is, where the problem names X, `sum_t a_t X_t G_t - (1 / T) X (sum_t a_t G_t + e I)`.
    """

    M: Float[Tensor, "out in"]
    diagnosis: Diagnosis
    trusted: bool
    residual: Float[Tensor, "out in"] | None = None
    by: Literal["itself", "refinement", "float64"] = "itself"


def least_squares(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """Solve the problem in `dtype`."""
    return (_dual if problem.prefers_dual else _primal)(problem, dtype, device)


def least_squares_trusted(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """Solve the problem in `dtype`, and again in float64 where that is not accurate enough, refinement included.

    The fit is in `dtype`, which holds what only came to be in float64.
    """
    fit = least_squares(problem, dtype, device)
    if fit.trusted:
        return fit
    del fit
    fit = least_squares(problem, torch.float64, device)
    residual = None if fit.residual is None else fit.residual.to(dtype)
    return replace(fit, M=fit.M.to(dtype), residual=residual, by="float64")


@dataclass(frozen=True)
class _Judged:
    """Whether a solution is accurate enough, and whether it was refined for that."""

    trusted: bool
    refined: bool = False

    @property
    def by(self) -> Literal["itself", "refinement"]:
        return "refinement" if self.refined else "itself"


def _judged(
    Y: Float[Tensor, "m n"],
    error: float,
    residual: Residual,
    inverse: Inverse,
    rows: tuple[Float[Tensor, "1 n"], Float[Tensor, "1 in"]] | None,
) -> _Judged:
    """Y with an estimated error, and the prior's row with its target, both refined in place where they need it.

    The estimate is made for the worst; what Y itself lacks may be less. Small layers, and those that are not wide, are
    sooner repeated than refined.
    """
    problem, tolerance, solved = residual.problem, error_tolerance(Y.shape[1]), inverse.diagnosis.regular
    if error <= tolerance:
        return _Judged(True)
    if not solved or Y.shape[1] <= SMALL or problem.measured or error > _HOPELESS:
        return _Judged(False)
    if rows is not None and not refined(rows[0], residual, inverse, tolerance, error, rows[1]):
        return _Judged(False)
    if probed_error(Y, residual, inverse) <= tolerance:
        return _Judged(True)
    wide = problem.shape[1] >= _WIDE * problem.shape[0]
    return _Judged(wide and refined(Y, residual, inverse, tolerance, error), True)


def _primal(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """In the input space: A (in, in), running sums over the experts.

    Where second moments are formed, one expert r is spared its product with its own, for A holds all of them:

        M = X_r + B' A^(-1),   B' = sum_(t != r) (X_t - X_r) (a_t G_t + l_t I) + (sum_t l_t - e) X_r
    """
    out, columns = problem.shape
    equations = NormalEquations(out, columns, dtype, device)
    pulls = problem.pulls or [0.0] * len(problem.weights)
    same, heaviest = problem.targets is problem.sources, problem.heaviest
    origin = problem.targets(heaviest, dtype) if problem.measured or out >= columns else None  # X_r
    room = torch.empty(problem.shape, dtype=dtype, device=device)
    for t, (weight, pull) in enumerate(zip(problem.weights, pulls, strict=True)):
        if origin is not None and t == heaviest:
            X, Z = origin, origin if same else problem.sources(t, dtype)
        else:
            Z = problem.sources(t, dtype, room if same else None)
            X = Z if same else problem.targets(t, dtype, room)
        if problem.measured:
            equations.add_moment(X, Z, weight, origin, room)
        else:
            equations.add(X, Z, weight, pull, origin, room)
    del room
    A, B = equations.sums()
    prior = None if problem.prior is None else problem.mean_of_columns(A.T) * problem.prior  # c, (in,)
    ridge = problem.ridge + problem.relative_ridge * A.diagonal().mean().item()
    A.diagonal().add_(ridge)
    if origin is not None:
        B.add_(origin, alpha=sum(pull for pull, a in zip(pulls, problem.weights, strict=True) if a) - ridge)
    inverse = invert(A)
    if origin is not None and not inverse.diagnosis.regular:  # then A^(-1) A is no identity
        B.addmm_(origin, A)
        origin = None
    M = inverse(B) if origin is None else inverse(B).add_(origin)
    row, diagnosis = None if prior is None else inverse(prior[None]), inverse.diagnosis
    rows = None if row is None else (row, problem.mean_row(dtype, device))
    judged = _judged(M, diagnosis.error(A, B, M), InInputs(problem, ridge), inverse, rows)
    del inverse
    if row is not None:
        M = with_rank_one(M, row[0], problem.ones)
    wanted = judged.trusted and problem.residual_of is not None
    residual = primal_residual(problem, A, B, origin) if wanted else None
    return Fit(M, diagnosis, judged.trusted, residual, judged.by)


def primal_residual(
    problem: Problem,
    A: Float[Tensor, "in in"],
    B: Float[Tensor, "out in"],
    origin: Float[Tensor, "out in"] | None,
) -> Float[Tensor, "out in"] | None:
    """`Fit.residual` from the system matrix A and the right-hand side `B + origin A`, None where none is wanted."""
    if problem.residual_of is None:
        return None
    residual, room = B.clone(), torch.empty_like(B)
    for t, pull in enumerate(problem.pulls or ()):
        if pull:
            residual.sub_(problem.targets(t, B.dtype, room), alpha=pull)
    share = room.copy_(problem.residual_of()).mul_(-1 / len(problem.weights))
    return residual.addmm_(share if origin is None else share.add_(origin), A)


def _dual(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """In the space of all rows: with F = stack_t sqrt(a_t) Z_t (N, in) and N = T out,
    `H F (F^T F + e I)^(-1) = H (F F^T + e I)^(-1) F`. F itself is never formed.
    """
    T, (out, columns) = len(problem.weights), problem.shape
    roots = torch.tensor(problem.weights, dtype=torch.float64).to(device).sqrt()  # (T,)
    per_row = roots.repeat_interleave(out).to(dtype)  # (N,)
    products = _row_products(problem.sources, T, out, dtype, device)  # Z Z^T, (N, N)
    own = _own_blocks(problem, products, dtype) * per_row  # sqrt(a_t) X_t Z_t^T side by side, (out, N)
    K = products.mul_(per_row).mul_(per_row[:, None])  # F F^T
    ridge = problem.ridge + problem.relative_ridge * K.trace().item() / columns
    K.diagonal().add_(ridge)
    H = own
    if problem.pulls is not None:  # l_t Z_t = (l_t / sqrt(a_t)) F_t
        per_expert = torch.tensor(problem.pulls, dtype=torch.float64).to(device) / roots
        pulls = per_expert.nan_to_num_(posinf=0.0).repeat_interleave(out).to(dtype)
        H = own + torch.eye(out, dtype=dtype, device=device).repeat(1, T) * pulls
    inverse = invert(K)
    Q, row = inverse(H), None
    if problem.prior is not None:
        means = torch.cat([problem.mean_of_columns(problem.sources(t, dtype)) for t in range(T)]) * per_row  # F 1 / in
        row = inverse((means * problem.prior)[None])  # c^T A^(-1) = f (F 1 / in)^T (F F^T + e I)^(-1) F
    rows = None if row is None else (row, problem.mean_row(dtype, device))
    judged = _judged(Q, inverse.diagnosis.error(K, H, Q), InRows(problem, ridge), inverse, rows)
    M = _times(Q * per_row, problem.sources, T, columns, dtype)
    if row is not None:
        M = with_rank_one(M, _times(row * per_row, problem.sources, T, columns, dtype)[0], problem.ones)
    if problem.residual_of is None or not judged.trusted:
        return Fit(M, inverse.diagnosis, judged.trusted, None, judged.by)
    wide = problem.residual_of().to(dtype)
    products = torch.cat([wide @ problem.sources(t, dtype).T for t in range(T)], 1) * per_row  # X F^T
    mixed = _times((own - products / T) * per_row, problem.sources, T, columns, dtype)
    return Fit(M, inverse.diagnosis, True, mixed.sub_(wide, alpha=ridge / T), judged.by)


def _row_products(sources: Experts, T: int, out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`Z Z^T` of all rows of all experts, (N, N), without a copy of them."""
    products = torch.empty(T, out, T, out, dtype=dtype, device=device)
    for s in range(T):
        Z = sources(s, dtype)
        symmetric_product(Z.T, products[s, :, s])
        for t in range(s):
            products[s, :, t] = Z @ sources(t, dtype).T
            products[t, :, s] = products[s, :, t].T
    return products.view(T * out, T * out)


def _own_blocks(problem: Problem, products: Float[Tensor, "N N"], dtype: torch.dtype) -> Float[Tensor, "out N"]:
    """`X_t Z_t^T` side by side."""
    T, out = len(problem.weights), problem.shape[0]
    if problem.targets is problem.sources:
        blocks = products.view(T, out, T, out)
        return torch.cat([blocks[t, :, t] for t in range(T)], 1)
    return torch.cat([problem.targets(t, dtype) @ problem.sources(t, dtype).T for t in range(T)], 1)


def _times(Q: Float[Tensor, "m N"], sources: Experts, T: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`Q stack_t Z_t`, (m, in)."""
    total = torch.zeros(len(Q), columns, dtype=dtype, device=Q.device)
    for t, part in enumerate(Q.view(len(Q), T, -1).unbind(1)):
        total.addmm_(part, sources(t, dtype))
    return total
