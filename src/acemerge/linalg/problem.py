"""What is asked of a least-squares fit: see `least_squares`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from acemerge.shapes import Float, Tensor

ALL = slice(None)
WIDTH = 512  # columns that are widened at a time


@runtime_checkable
class Experts(Protocol):
    """The matrix (out, in) of the t-th expert in a type, made when asked for: no more than a few exist at once.

    One that is not there already may be made in `room`: new memory takes longer than the arithmetic. With `columns`
    these alone are made.
    """

    def __call__(self, t: int, dtype: torch.dtype, room: Tensor | None = None, columns: slice = ALL) -> Tensor: ...


def as_given(deltas: Float[Tensor, "T out in"]) -> Experts:
    """The task vectors themselves."""
    return lambda t, dtype, room=None, columns=ALL: in_type(deltas[t][:, columns], dtype, room)


def in_type(D: Float[Tensor, "out in"], dtype: torch.dtype, room: Tensor | None) -> Float[Tensor, "out in"]:
    """D itself where it is in this type, else a copy, in the room where there is one."""
    return D.to(dtype) if room is None or D.dtype == dtype else room.copy_(D)


def column_parts(Y: Float[Tensor, "m n"]) -> list[slice]:
    """The columns of Y in parts that are few enough to be widened at a time."""
    return [slice(start, start + WIDTH) for start in range(0, Y.shape[1], WIDTH)]


@dataclass(frozen=True)
class Problem:
    """What a rule asks for. `targets` and `sources` may be one and the same function, and must be for pulls.

    `measured`: the sources are the second moments G_t (in, in); not with pulls.

    The ridge e is `ridge + relative_ridge * mean(diag(sum_t a_t G_t))`. `prior` is the factor f of the row
    `c = f (1 / in) 1^T sum_t a_t G_t`, None without it. `ones` is 1 (in,) in other coordinates than the layer's own.
    `residual_of` makes the X (out, in) whose residual is wanted: with the fit, so that what it is made from need not be
    kept beside what comes of it.
    """

    targets: Experts
    sources: Experts
    weights: list[float]
    shape: tuple[int, int]
    pulls: list[float] | None = None
    ridge: float = 0.0
    relative_ridge: float = 0.0
    prior: float | None = None
    ones: Tensor | None = None
    measured: bool = False
    residual_of: Callable[[], Tensor] | None = None

    def mean_of_columns(self, X: Float[Tensor, "m in"]) -> Float[Tensor, " m"]:
        """`X 1 / in`."""
        return X.mean(1) if self.ones is None else X @ self.ones.to(X.dtype) / X.shape[1]

    def mean_row(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "1 in"]:
        """`f 1^T / in`, the target whose product with the second moments is c."""
        ones = torch.ones(self.shape[1], dtype=dtype, device=device) if self.ones is None else self.ones.to(dtype)
        return (ones * ((self.prior or 0.0) / self.shape[1]))[None]

    @property
    def heaviest(self) -> int:
        """The expert of the largest weight, of which M cannot be far."""
        return max(range(len(self.weights)), key=self.weights.__getitem__)

    @property
    def prefers_dual(self) -> bool:
        """Fewer rows in all experts together than columns: their own space is smaller, and of full rank."""
        return not self.measured and prefers_dual(len(self.weights), *self.shape)


def prefers_dual(experts: int, rows: int, columns: int) -> bool:
    """Whether N = T out rows are fewer than the columns."""
    return experts * rows < columns
