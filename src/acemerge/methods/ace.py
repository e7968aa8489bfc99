"""ACE-Merging: adaptive covariance estimation from the task vectors alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.least_squares import Fit
from acemerge.linalg.lowrank import Frame
from acemerge.linalg.problem import ALL, Problem, in_type, prefers_dual
from acemerge.linalg.rounding import NULL
from acemerge.linalg.spectral import leading_polar
from acemerge.methods.actmat import least_squares_operations
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, no_update
from acemerge.methods.least_squares_rule import LeastSquaresRule
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_TINY = 1e-12  # added inside the log and to the denominator of gamma
_NO_RIDGE = 1e-8  # eps from which a system counts as regular for energies up to 1e4: see `solve.largest_condition`
_VECTORS = 200  # rows and columns of the layer, sums of them that are looked at included, in all
_CANCELLED = 1 / 16  # share of the energy that must be left for a difference to be trusted


@dataclass(frozen=True)
class _AceWork:
    """What ACE holds at its peak, a repetition in float64 with its refinement included: in the fit, in the residual
    that is refined, in the spectrum of that, and where the ridge may be lost in rounding in a pseudo-inverse.
    """

    may_be_singular: bool

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        layer, shorter, stacked = rows * columns, min(rows, columns) ** 2, experts * rows
        spectrum = 6 * layer + 10 * shorter
        if prefers_dual(experts, rows, columns):
            system, beside = stacked**2, 9 * rows * stacked
            fit = 11 * layer + beside + 9 * system // 2
        else:
            system, beside = columns**2, 4 * layer
            fit = max(13 * layer + 2 * system, 6 * layer + 9 * system // 2, 4 * layer + 5 * system)
        singular = 4 * layer + beside + 8 * system if self.may_be_singular else 0
        return max(fit, spectrum, singular) + _VECTORS * (rows + columns)


@dataclass(frozen=True)
class _Active:
    """The experts that count, the factors on their second moments, the branch they are merged in and how many singular
    values are refined there.
    """

    deltas: Float[Tensor, "T out in"]
    scales: Float[Tensor, " T"]
    gamma: float | None
    heterogeneous: bool
    refined: int
    layer: Layer


@dataclass(frozen=True)
class Ace(LeastSquaresRule[_Active]):
    r"""ACE-Merging, exactly as published: the closed form on centred task vectors, with the collective
    structural prior and the spectral refinement.

    With `C_t = D_t - 1 mu_t^T`, `S_t = C_t^T C_t`, `z_t = tr S_t`, `n_t = ||D_t||_F^2`:

        gamma = var(log n_t) / mean(log n_t)^2           heterogeneous branch when gamma > tau
        R_t   = S_t + eps I                              homogeneous
        R_t   = S_t + (eps / z_t) I, S_t <- S_t / z_t    heterogeneous
        c     = (1/in) 1^T sum S_t  (/ mean n_t)         the prior row; P = 1 c^T
        pre   = (sum C_t R_t) (sum R_t + P)^(-1)
        M     = pre + mean(s[:k]) U_k V_k^T              heterogeneous; U s V^T = svd(res + pre),
                res = sum D_t (S_t - Rbar), Rbar = mean R_t, k = int(k_frac * min(out, in))

    Source: arXiv 2603.02945 (CVPR 2026). Departures, all where the paper's formula is undefined: experts
    with no update or no weight drop out; one expert is homogeneous; k = 0 leaves `pre` unrefined; null
    directions of the refinement, those of `leading_polar`, add nothing; an update whose rows are all alike, z_t = 0,
    has no say in a heterogeneous layer, where the authors' code gives it a ridge of eps / 1e-12. That code adds 1e-12
    to n_t in the logarithm and to gamma's denominator, as is done here, and to z_t and mean n_t, which is not. `eps`
    is in units of the squared update: the paper uses 4e-2 for GPT-2, 2e-4 for RoBERTa-base and 1e-5 for all others,
    the authors' code 1e-2 for every family. A weight multiplies S_t and R_t, and may not be negative.
    `float64_spectra` is 1 where the refinement's spectrum was not left to float32.
    """

    name: ClassVar[str] = "ace"
    source: ClassVar[str] = "arXiv 2603.02945"
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False, description="ridge on every second moment")] = 1e-5
    tau: Annotated[float, Field(allow_inf_nan=False, description="heterogeneous branch when gamma is above it")] = 0.3
    k_frac: Annotated[float, Field(ge=0, le=1, description="share of the spectrum that is refined")] = 0.3
    ablation: Annotated[
        Literal["E1", "E2", "E3", "E4"],
        Field(description="E1 closed form, E2 + normalisation, E3 + prior, E4 + refinement (all)"),
    ] = "E4"
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        work = _AceWork(may_be_singular=self.eps < _NO_RIDGE)
        return Needs(matrix=True, weights="not negative", work=work, factors="frame", input_side=True)

    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, _Active] | LayerResult:
        weights, n = layer.weights, energies(deltas)
        active = (n > 0) & (weights > 0)
        if not active.any():
            return no_update(deltas)
        if not active.all():
            deltas, weights, n = deltas[active], weights[active], n[active]
        gamma = heterogeneity(n)
        hetero = self.ablation != "E1" and gamma is not None and gamma > self.tau
        a = second_moment_scales(deltas, weights, layer.frame) if hetero else weights
        refined = int(self.k_frac * min(layer.sides(deltas))) if hetero and self.ablation == "E4" else 0
        problem = self._closed_form(deltas, a, n.mean().item() if hetero else 1.0, layer)
        problem = replace(problem, residual_of=partial(deltas.sum, 0) if refined else None)
        return problem, _Active(deltas, a, gamma, hetero, refined, layer)

    def from_fit(self, fit: Fit, kept: _Active) -> tuple[Float[Tensor, "out in"], LayerStats]:
        M, in_float64 = fit.M, 0
        if fit.residual is not None:
            direction = add_mean_rows(fit.residual, kept.deltas, kept.scales, kept.layer.frame).add_(M)
            leading = leading_polar(direction, kept.refined)
            M.add_(leading.polar, alpha=float(leading.singular_values.mean()))
            in_float64 = int(leading.singular_values.dtype == torch.float64)
        branch: Literal["heterogeneous", "homogeneous"] = "heterogeneous" if kept.heterogeneous else "homogeneous"
        stats = LayerStats(gamma=kept.gamma, branch=branch, eps=self.eps, refined=kept.refined)
        return M, replace(stats, float64_spectra=in_float64)

    def _closed_form(self, deltas: Tensor, a: Tensor, mean_energy: float, layer: Layer) -> Problem:
        """`pre`: estimated from the centred task vectors, ridge and prior as the regulariser."""
        frame, columns = layer.frame, deltas.shape[2]

        def centred(t: int, dtype: torch.dtype, room: Tensor | None = None, columns: slice = ALL) -> Tensor:
            return centre(in_type(deltas[t][:, columns], dtype, room), frame, room)

        return Problem(
            targets=centred,
            sources=centred,
            weights=a.tolist(),
            shape=(deltas.shape[1], columns),
            pulls=(self.eps * a).tolist(),
            ridge=self.eps * a.sum().item(),
            prior=columns / layer.sides(deltas)[1] / mean_energy if self.ablation in ("E3", "E4") else None,
            ones=None if frame is None else frame.columns,
        )

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """A refinement is the residual's product, a Gram matrix, its eigenvectors and two products with k of them."""
        shorter = min(rows, columns)
        refine = rows * columns * (2 * columns + shorter + 4 * int(self.k_frac * shorter)) + 9 * shorter**3
        fit = least_squares_operations(experts, rows, columns, symmetric=True)
        return fit + (refine if self.ablation == "E4" else 0)


def column_means(
    D: Float[Tensor, "out in"], frame: Frame | None
) -> tuple[Float[Tensor, " in"], Float[Tensor, " out"] | None]:
    """The column means mu and, where D is a core and 1 not just ones, `1` in its coordinates.

    In a frame `mu^T = (1 / out) 1^T D`, with out the layer's.
    """
    if frame is None:
        return D.mean(0), None
    ones = frame.rows.to(D.dtype)
    return (ones @ D) / frame.shape[0], ones


def centre(
    D: Float[Tensor, "out in"], frame: Frame | None, room: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, "out in"]:
    """`C = D - 1 mu^T`, made in the room where given."""
    mu, ones = column_means(D, frame)
    return torch.sub(D, mu, out=room) if ones is None else torch.addr(D, ones, mu, alpha=-1, out=room)


def second_moment_scales(
    deltas: Float[Tensor, "T out in"], weights: Float[Tensor, " T"], frame: Frame | None = None
) -> Float[Tensor, " T"]:
    """`a_t = w_t / z_t`; zero where every row is alike, to rounding, and there is nothing to normalise."""
    n = energies(deltas)
    z = torch.stack([_centred_energy(D, energy, frame) for D, energy in zip(deltas, n, strict=True)])
    rounding = n * NULL**2
    return torch.where(z > rounding, weights / z, 0)


def _centred_energy(D: Tensor, energy: Tensor, frame: Frame | None) -> Tensor:
    """`||C||^2 = ||D||^2 - (2 out - 1^T 1) ||mu||^2`, out the layer's, from C itself where little would be left."""
    mu, ones = column_means(D, frame)
    count = D.shape[0] if frame is None or ones is None else 2 * frame.shape[0] - ones.double().square().sum()
    left = energy - count * mu.double().square().sum()
    return left if left > _CANCELLED * energy else energies(centre(D, frame)[None])[0]


def add_mean_rows(
    total: Float[Tensor, "out in"],
    deltas: Float[Tensor, "T out in"],
    a: Float[Tensor, " T"],
    frame: Frame | None = None,
) -> Float[Tensor, "out in"]:
    """`total + 1 sum_t a_t mu_t^T S_t`, in place: `D_t S_t = C_t S_t + 1 mu_t^T S_t`, and `mu^T S = (C mu)^T C`."""
    for update, scale in zip(deltas, a.tolist(), strict=True):
        D = update.to(total.dtype)
        mu, ones = column_means(D, frame)
        one = torch.ones_like(D[:, 0]) if ones is None else ones
        along = D @ mu - mu.dot(mu) * one  # C mu, (out,)
        row = (along @ D - along.dot(one) * mu) * scale  # (in,)
        total += row if ones is None else torch.outer(ones, row)
    return total


def heterogeneity(n: Float[Tensor, " T"]) -> float | None:
    """`gamma = var(log n_t, unbiased) / mean(log n_t)^2`; None for one expert, where it is undefined."""
    if len(n) < 2:
        return None
    logs = torch.log(n + _TINY)
    return float(logs.var() / (logs.mean().square() + _TINY))
