"""The principal directions of a matrix: what share of it they hold, and how near those of several matrices are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from acemerge.linalg.gram import energies
from acemerge.linalg.krylov import leading_triplets
from acemerge.linalg.spectral import leading_singular
from acemerge.shapes import Float, Tensor

WHOLE_SPECTRUM = 1024  # up to this shorter side all singular values are found
_TOP = 20  # one direction in so many is a principal one: 5 %


@dataclass(frozen=True)
class Principal:
    """The principal directions of a matrix (out, in), in float64.

    `values` are singular values, descending: all of them where the shorter side is at most 1024, else the `count`
    largest. `left` (out, k) and `right` (in, k) are the singular vectors of the first; k is `count`, or the rank where
    that is lower. `energy` is the squared Frobenius norm.
    """

    values: Float[Tensor, " n"]
    left: Float[Tensor, "out k"]
    right: Float[Tensor, "in k"]
    count: int
    energy: float

    @property
    def share(self) -> float | None:
        """`sum_(i <= count) s_i^2 / ||X||_F^2`; None for a matrix of zeros."""
        found = float(self.values[: self.count].square().sum())
        return min(1.0, found / self.energy) if self.energy else None


def principal_count(shape: tuple[int, int]) -> int:
    """How many directions are the top 5 % of min(out, in), rounded up."""
    return -(-min(shape) // _TOP)


def principal(X: Float[Tensor, "out in"]) -> Principal:
    """By the smaller Gram matrix where the shorter side is at most 1024.

    Beyond it the singular values come from a Krylov space, from below: see `leading_triplets`.
    """
    shape = (X.shape[0], X.shape[1])
    count, energy = principal_count(shape), float(energies(X[None]))
    small = min(shape) <= WHOLE_SPECTRUM
    found = leading_singular(X.double(), min(shape)) if small else leading_triplets(X, count)
    k = min(count, found.rank)
    return Principal(found.s.cpu(), found.U[:, :k].cpu(), found.V[:, :k].cpu(), count, energy)


def first_cosines(bases: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "T T"]:
    """`|<v_s, v_t>|` of the first direction of each orthonormal basis; NaN for one without any."""
    count = len(bases)
    found = torch.full((count, count), torch.nan, dtype=torch.float64)
    for s, t in _pairs(bases):
        found[s, t] = found[t, s] = (bases[s][:, 0] @ bases[t][:, 0]).abs()
    return found.clamp(max=1)


def overlaps(bases: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "T T"]:
    """The root mean square cosine of the principal angles, `||V_s^T V_t||_F / sqrt(min(k_s, k_t))`; NaN without any.

    1 where one space holds the other, `sqrt(max(k_s, k_t) / n)` in the root mean square where they have nothing to do
    with each other.
    """
    count = len(bases)
    found = torch.full((count, count), torch.nan, dtype=torch.float64)
    for s, t in _pairs(bases):
        shorter = min(bases[s].shape[1], bases[t].shape[1])
        found[s, t] = found[t, s] = (bases[s].T @ bases[t]).norm() / shorter**0.5
    return found.clamp(max=1)


def _pairs(bases: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Pairs of bases with a direction, each with itself too."""
    there = [t for t, basis in enumerate(bases) if basis.shape[1]]
    return [(s, t) for s in there for t in there if s <= t]


def matrix_cosine(A: Float[Tensor, "n n"], B: Float[Tensor, "n n"]) -> float | None:
    """`<A, B>_F / (||A||_F ||B||_F)`, in float64; None where one is zero.

    Of two second moments: 1 where one is a multiple of the other. Both are positive semidefinite, so it is never
    below zero, and that of an identity with any other of rank r is at most `sqrt(r / n)`.
    """
    A, B = A.double(), B.double()
    norms = float(A.norm() * B.norm())
    return float((A * B).sum()) / norms if norms else None
