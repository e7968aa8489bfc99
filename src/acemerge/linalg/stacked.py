"""Many small least-squares problems at once: a call of torch's takes as long as its work on one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from acemerge.linalg.least_squares import Fit, least_squares, primal_residual
from acemerge.linalg.problem import Experts, Problem
from acemerge.linalg.solve import Diagnosis, largest_condition, solve, spectrum_estimates, with_rank_one
from acemerge.shapes import Float, Tensor


def least_squares_together(problems: Sequence[Problem], device: torch.device) -> list[Fit]:
    """Every problem in float64: small ones of one shape in as many calls as one takes.

    What is singular, or better solved in the space of all rows, is solved by itself.
    """
    fits: dict[int, Fit] = {}
    alike: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for i, problem in enumerate(problems):
        if not problem.prefers_dual and problem.ones is None:
            alike.setdefault((len(problem.weights), problem.shape), []).append(i)
    for members in alike.values():
        found = zip(members, _stack([problems[i] for i in members], device), strict=True)
        fits |= {i: fit for i, fit in found if fit is not None}
    for i, problem in enumerate(problems):
        if i not in fits:
            fits[i] = least_squares(problem, torch.float64, device)
    return [fits[i] for i in range(len(problems))]


def _stack(problems: Sequence[Problem], device: torch.device) -> list[Fit | None]:
    """P problems of one shape in the input space: A is (P, in, in). None for what may be singular."""
    T, (out, n) = len(problems[0].weights), problems[0].shape
    Z = _of_all([p.sources for p in problems], T)  # (P, T, out, in)
    same = all(p.targets is p.sources for p in problems)
    X = Z if same else _of_all([p.targets for p in problems], T)
    a, pulls = (
        torch.tensor(rows, dtype=Z.dtype).to(device)[..., None, None]
        for rows in ([p.weights for p in problems], [p.pulls or [0.0] * T for p in problems])
    )
    weighted = a * Z
    A = weighted.flatten(1, 2).mT @ Z.flatten(1, 2)  # (P, in, in)
    B = (X @ Z.mT @ weighted if out < n else X @ (Z.mT @ weighted)).add_(pulls * X).sum(1)  # (P, out, in)
    means = A.mean(-2)  # (P, in)
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    fixed, relative, prior = (
        torch.tensor(column, dtype=Z.dtype).to(device)
        for column in zip(*((p.ridge, p.relative_ridge, p.prior or 0.0) for p in problems), strict=True)
    )
    diagonal.add_((fixed + relative * diagonal.mean(-1))[:, None])
    L, failed = torch.linalg.cholesky_ex(A)
    conditions, norms = spectrum_estimates(A, L)
    M = solve(L, B)
    if any(p.prior is not None for p in problems):  # where there is none, its row is zero
        M = with_rank_one(M, solve(L, (means * prior[:, None])[:, None])[:, 0])
    regular = (failed == 0) & (conditions < largest_condition(A))  # not so for NaN
    fits: list[Fit | None] = []
    found = zip(problems, regular.tolist(), conditions.tolist(), norms.tolist(), strict=True)
    for i, (problem, well, condition, norm) in enumerate(found):
        diagnosis = Diagnosis(True, condition, n, norm)
        fits.append(Fit(M[i], diagnosis, True, primal_residual(problem, A[i], B[i], None)) if well else None)
    return fits


def _of_all(experts: Sequence[Experts], T: int) -> Float[Tensor, "P T out in"]:
    return torch.stack([torch.stack([matrix(t, torch.float64) for t in range(T)]) for matrix in experts])
