"""What task vectors look like beside each other: energies, directions, agreement, rank. Pure functions on tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from acemerge.linalg.gram import symmetric_product
from acemerge.linalg.krylov import leading_values, spectral_norms
from acemerge.linalg.principal import WHOLE_SPECTRUM
from acemerge.methods.trust import Disturbance
from acemerge.shapes import Float, Tensor

_BLOCK = 1 << 18  # entries of an expert that are widened at once
_LEADING = 32  # so many singular values where not all are found


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of T task vectors, in float64: those of pieces, and of tensors, add up.

    `products` (T, T) are `<D_s, D_t>`; `base` is `||W_0||_F^2`; `magnitude` is `sum |D_tij|` over experts and entries
    and `left` is `sum_ij |sum_t D_tij|`, what is left of it when the experts are added. `entries` counts those of W_0.
    """

    products: Float[Tensor, "T T"]
    base: float
    magnitude: float
    left: float
    entries: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.products + other.products,
            self.base + other.base,
            self.magnitude + other.magnitude,
            self.left + other.left,
            self.entries + other.entries,
        )

    @property
    def energies(self) -> Float[Tensor, " T"]:
        """`n_t = ||D_t||_F^2`."""
        return self.products.diagonal()

    @property
    def shares(self) -> Float[Tensor, " T"]:
        """`n_t / sum_s n_s`; zero where nothing changed."""
        total = self.energies.sum()
        return self.energies / total if total > 0 else torch.zeros_like(self.energies)

    @property
    def distances(self) -> Float[Tensor, " T"]:
        """`||D_t||_F / ||W_0||_F`; infinite from a base of zeros, NaN where nothing changed it either."""
        return (self.energies / self.base).sqrt() if self.base else self.energies.sqrt() / 0

    @property
    def cosines(self) -> Float[Tensor, "T T"]:
        """`<D_s, D_t> / (||D_s|| ||D_t||)`; NaN for an expert without an update."""
        norms = self.energies.sqrt()
        return (self.products / torch.outer(norms, norms)).clamp(-1, 1)

    @property
    def added(self) -> float:
        """`||sum_t D_t||_F`: how far the experts would move the weights if they were added."""
        return math.sqrt(max(0.0, float(self.products.sum())))

    @property
    def added_beside_orthogonal(self) -> float:
        """`||sum_t D_t||_F / sqrt(sum_t n_t)`: 1 at right angles, `sqrt(T)` for T equal ones; NaN without updates."""
        return self.added / float(self.energies.sum()) ** 0.5 if self.energies.any() else math.nan

    @property
    def added_beside_base(self) -> float:
        """`||sum_t D_t||_F / ||W_0||_F`; infinite from a base of zeros, NaN where nothing changed it either."""
        return self.added / self.base**0.5 if self.base else math.inf if self.added else math.nan

    @property
    def dissenting_step(self) -> float:
        """`q^(1/2) ||sum_t D_t||_F / w` with q and w of `methods.trust`, the experts alike in weight: how far adding
        them moves the weights, where they do not want the same.
        """
        p, n = self.shares, self.energies
        among = float(p @ n)
        if not among:
            return 0.0
        known = Disturbance(max(0.0, 1 - float(p @ self.products @ p) / among), self.base + float(n.mean()))
        return math.sqrt(known.moved(self.added**2))

    @property
    def cancelled(self) -> float:
        """The share of the experts' magnitude that is lost when they are added: `1 - left / magnitude`.

        0 where all signs agree, `1 - 1 / sqrt(T)` for independent normal updates of one size, 1 where they undo each
        other.
        """
        return max(0.0, 1 - self.left / self.magnitude) if self.magnitude else 0.0


def sums(deltas: Float[Tensor, "T *shape"], W0: Float[Tensor, "*shape"]) -> Sums:
    """The sums of one tensor, or of a piece of it; accumulated in float64, block by block."""
    T, flat, W = len(deltas), deltas.reshape(len(deltas), -1), W0.reshape(-1)
    products = torch.zeros(T, T, dtype=torch.float64, device=deltas.device)
    scalars = torch.zeros(3, dtype=torch.float64, device=deltas.device)
    for D, base in zip(flat.split(_BLOCK, 1), W.split(_BLOCK), strict=True):
        D, base = D.double(), base.double()
        products.addmm_(D, D.T)
        scalars += torch.stack([base @ base, D.abs().sum(), D.sum(0).abs().sum()])
    base_energy, magnitude, left = scalars.tolist()
    return Sums(products.cpu(), base_energy, magnitude, left, W0.numel())


def nothing(experts: int) -> Sums:
    """The sums of no tensor."""
    return Sums(torch.zeros(experts, experts, dtype=torch.float64), 0.0, 0.0, 0.0, 0)


def squared_norms(deltas: Float[Tensor, "T *slices out in"]) -> Float[Tensor, " T"]:
    """`||D_t||_2^2`, summed over the matrices of a stack; see `spectral_norms` for how exact."""
    found = [spectral_norms(D.reshape(-1, *D.shape[-2:])).square().sum() for D in deltas]
    return torch.stack(found).cpu()


def stable_ranks(energies: Float[Tensor, " T"], squared_norms: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """`||D_t||_F^2 / ||D_t||_2^2`: 1 for one direction, r for r equal ones, never above the rank; NaN without update.

    For a stack of matrices the mean over them, weighted by their squared norms.
    """
    return energies / squared_norms


def spectrum(D: Float[Tensor, "*slices out in"]) -> Float[Tensor, " k"]:
    """Singular values, descending, in float64: all where the shorter side is at most 1024, else the 32 largest.

    Of a stack of matrices `sqrt(mean_p s_pi^2)`, the root mean square over them: its squares add up to the mean energy.

    All come from the eigenvalues of the smaller Gram matrix: below 1e-8 of the largest they are rounding.
    """
    if D.ndim > 2:
        stack = D.reshape(-1, *D.shape[-2:])
        squares: Tensor = sum((spectrum(X).square() for X in stack[1:]), spectrum(stack[0]).square())
        return (squares / len(stack)).sqrt()
    if min(D.shape) > WHOLE_SPECTRUM:
        return leading_values(D, _LEADING).cpu()
    X = D.double()
    gram = symmetric_product(X if X.shape[0] >= X.shape[1] else X.T)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0).sqrt().cpu()
