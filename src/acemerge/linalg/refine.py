"""Iterative refinement: float32 factors the system, float64 says what is missing.

What rounding made of a solution Y shows in its residual, which is made from the task vectors themselves, a few columns
of them at a time, without the system matrix; with the factors that float32 has, it becomes what Y lacks. It takes
`4 T out^2 in` operations, each of which takes twice as long in float64: for wide layers much less than a repetition,
for square ones as much.

    in the input space        sum_t (X_t - Y) (a_t G_t + l_t I) + (sum_t l_t - e) Y,   Y A = B
    in the space of all rows  a_t^(1/2) (X_t - Q F) Z_t^T + l_t a_t^(-1/2) I - e Q_t,  side by side,   Q K = H
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, runtime_checkable

import torch

from acemerge.linalg.problem import WIDTH, Problem, column_parts
from acemerge.shapes import Float, Tensor

Solve = Callable[[Tensor], Tensor]
Rows = Callable[[Tensor], Tensor]  # some rows of a matrix, or sums of rows
Pair = Callable[[slice], tuple[Tensor, Tensor]]  # these columns of X_t, rows of it alone, and of Z_t

_STEPS = 4
_CONVERGES = 0.25  # share of an error that a step may leave: with more it is no longer sure to vanish
_PROBES = 32
_SURE = 1.5  # 32 sums see less than two thirds of an error once in a thousand times, of one along many directions never


@runtime_checkable
class Residual(Protocol):
    """What rows of a solution lack, in float64. With `row` (1, in) this is their target, without a pull."""

    @property
    def problem(self) -> Problem: ...

    def parts(self, m: int) -> Iterable[slice]:
        """The rows of a solution whose residuals are made at a time."""
        ...

    def __call__(self, Y: Float[Tensor, "m n"], rows: Rows, row: Tensor | None = None) -> Float[Tensor, "m n"]: ...


def probed_error(Y: Float[Tensor, "m n"], residual: Residual, solve: Solve) -> float:
    """An estimate of `||dY|| / ||Y||` from above, from what a few random sums of rows lack: `E ||g dY||^2 = ||dY||^2`.
    It costs next to nothing.
    """
    signs = _signs(len(Y)).to(Y.device)
    sums = torch.cat([signs @ Y[:, part].double() for part in column_parts(Y)], 1)
    missing = _solved(solve, residual(sums, lambda X: signs @ X))
    size = float(Y.norm())
    return _SURE * float(missing.norm()) / _PROBES**0.5 / size if size else 0.0


@lru_cache(maxsize=64)
def _signs(n: int) -> Float[Tensor, "p n"]:
    signs = torch.randint(0, 2, (_PROBES, n), generator=torch.Generator().manual_seed(n))
    return signs.mul_(2).sub_(1).double()


def refined(
    Y: Float[Tensor, "m n"],
    residual: Residual,
    solve: Solve,
    tolerance: float,
    rate: float,
    row: Float[Tensor, "1 in"] | None = None,
) -> bool:
    """Add to Y what it lacks, in place, until its estimated error is at most the tolerance; whether that was reached.

    `rate` bounds the share of an error that a step leaves, as far as is known before the first. `row` is the target
    where that is no expert's.
    """
    before = 0.0
    for _ in range(_STEPS):
        if not rate <= _CONVERGES:  # NaN too
            return False
        moved = _step(Y, residual, solve, row)
        rate = moved / before if before else rate
        if moved * rate <= tolerance or (row is None and probed_error(Y, residual, solve) <= tolerance):
            return True
        before = moved
    return False


def _step(Y: Float[Tensor, "m n"], residual: Residual, solve: Solve, row: Tensor | None) -> float:
    """`||dY|| / ||Y||` of a step."""
    size, change = float(Y.norm()), 0.0
    for part in residual.parts(len(Y)):
        missing = _solved(solve, residual(Y[part].double(), operator.itemgetter(part), row))
        change += float(missing.norm()) ** 2
        Y[part] += missing
    return change**0.5 / size if size else 0.0


def _solved(solve: Solve, R: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """In float32, whose range R may be beyond."""
    largest = float(R.abs().amax())
    return solve((R / largest).float()).mul_(largest) if largest else torch.zeros_like(R, dtype=torch.float32)


@dataclass(frozen=True)
class InInputs:
    """`Residual` in the input space."""

    problem: Problem
    ridge: float

    def parts(self, m: int) -> Iterable[slice]:
        half = -(-m // 2)
        return (slice(start, start + half) for start in range(0, m, half))

    def __call__(self, Y: Float[Tensor, "m in"], rows: Rows, row: Tensor | None = None) -> Float[Tensor, "m in"]:
        pulls = self.problem.pulls if row is None else None
        active = [(t, a, pulls[t] if pulls else 0.0) for t, a in enumerate(self.problem.weights) if a]
        R = Y * (sum(pull for _, _, pull in active) - self.ridge)
        room = Y.new_empty(self.problem.shape[0] * WIDTH)
        for t, a, pull in active:
            self._add(R, Y, partial(_widened, self.problem, t, rows, row, room=room), a, pull)
        return R

    def _add(self, R: Tensor, Y: Tensor, pair: Pair, a: float, pull: float) -> None:
        """`R += (X_t - Y) (a_t Z_t^T Z_t + l_t I)`."""
        left = torch.zeros(len(Y), self.problem.shape[0], dtype=Y.dtype, device=Y.device)
        for part in column_parts(Y):
            X, Z = pair(part)
            left.addmm_(X - Y[:, part], Z.T)
        for part in column_parts(Y):
            X, Z = pair(part)
            R[:, part].addmm_(left, Z, alpha=a)
            if pull:
                R[:, part].add_(X - Y[:, part], alpha=pull)


@dataclass(frozen=True)
class InRows:
    """`Residual` in the space of all rows, of Q (m, T out)."""

    problem: Problem
    ridge: float

    def parts(self, m: int) -> Iterable[slice]:
        return (slice(0, m),)

    def __call__(self, Y: Float[Tensor, "m N"], rows: Rows, row: Tensor | None = None) -> Float[Tensor, "m N"]:
        problem, Q = self.problem, Y.view(len(Y), len(self.problem.weights), -1)
        out, columns = problem.shape
        roots = [a**0.5 for a in problem.weights]
        left = torch.zeros_like(Q)
        for part in column_parts(Y.new_empty(0, columns)):
            pairs = [_widened(problem, t, rows, row, part) for t in range(len(roots))]
            M = sum((Q[:, t] @ Z).mul_(roots[t]) for t, (_, Z) in enumerate(pairs))
            for t, (X, Z) in enumerate(pairs):
                left[:, t].addmm_(X - M, Z.T, alpha=roots[t])
        if problem.pulls is not None and row is None:
            identity = rows(torch.eye(out, dtype=Y.dtype, device=Y.device))
            for t, (pull, root) in enumerate(zip(problem.pulls, roots, strict=True)):
                left[:, t].add_(identity, alpha=pull / root if root else 0.0)
        return left.sub_(Q, alpha=self.ridge).view_as(Y)


def _widened(
    problem: Problem, t: int, rows: Rows, row: Tensor | None, part: slice, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Columns of the rows of X_t, or of the target `row`, and of Z_t, this made in the room where there is one: memory
    that is taken anew for each of many is not all used again.
    """
    out, width = problem.shape[0], len(range(*part.indices(problem.shape[1])))
    Z = problem.sources(t, torch.float64, None if room is None else room[: out * width].view(out, width), part)
    if row is not None:
        return row[:, part].double(), Z
    return rows(Z if problem.targets is problem.sources else problem.targets(t, torch.float64, None, part)), Z
