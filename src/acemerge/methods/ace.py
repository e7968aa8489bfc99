"""ACE-Merging: adaptive covariance estimation from the task vectors alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.linalg.gram import energies
from acemerge.linalg.least_squares import Fit
from acemerge.linalg.lowrank import Frame
from acemerge.linalg.problem import ALL, Problem, column_parts, in_type, prefers_dual
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

    centred: Centred
    scales: Float[Tensor, " T"]
    gamma: float | None
    heterogeneous: bool
    refined: int


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
        centred = Centred(deltas, layer.frame)
        a = centred.second_moment_scales(weights, n) if hetero else weights
        refined = int(self.k_frac * min(layer.sides(deltas))) if hetero and self.ablation == "E4" else 0
        problem = self._closed_form(centred, a, n.mean().item() if hetero else 1.0, layer)
        problem = replace(problem, residual_of=partial(deltas.sum, 0) if refined else None)
        return problem, _Active(centred, a, gamma, hetero, refined)

    def from_fit(self, fit: Fit, kept: _Active) -> tuple[Float[Tensor, "out in"], LayerStats]:
        M, in_float64 = fit.M, 0
        if fit.residual is not None:
            direction = kept.centred.add_mean_rows(fit.residual, kept.scales).add_(M)
            leading = leading_polar(direction, kept.refined)
            M.add_(leading.polar, alpha=float(leading.singular_values.mean()))
            in_float64 = int(leading.singular_values.dtype == torch.float64)
        branch: Literal["heterogeneous", "homogeneous"] = "heterogeneous" if kept.heterogeneous else "homogeneous"
        stats = LayerStats(gamma=kept.gamma, branch=branch, eps=self.eps, refined=kept.refined)
        return M, replace(stats, float64_spectra=in_float64)

    def _closed_form(self, centred: Centred, a: Tensor, mean_energy: float, layer: Layer) -> Problem:
        """`pre`: estimated from the centred task vectors, ridge and prior as the regulariser."""
        out, columns = centred.deltas.shape[1:]
        return Problem(
            targets=centred,
            sources=centred,
            weights=a.tolist(),
            shape=(out, columns),
            pulls=(self.eps * a).tolist(),
            ridge=self.eps * a.sum().item(),
            prior=columns / layer.sides(centred.deltas)[1] / mean_energy if self.ablation in ("E3", "E4") else None,
            ones=None if layer.frame is None else layer.frame.columns,
        )

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """A refinement is the residual's product, a Gram matrix, its eigenvectors and two products with k of them."""
        shorter = min(rows, columns)
        refine = rows * columns * (2 * columns + shorter + 4 * int(self.k_frac * shorter)) + 9 * shorter**3
        fit = least_squares_operations(experts, rows, columns, symmetric=True)
        return fit + (refine if self.ablation == "E4" else 0)


@dataclass(frozen=True)
class Centred:
    """`C_t = D_t - 1 mu_t^T` of the task vectors D_t (out, in), mu_t (in,) their column means.

    Where the D_t are cores, `1` is not just ones, and in its coordinates `mu^T = (1 / out) 1^T D`, out the layer's.
    Each mu_t is made once in a type.
    """

    deltas: Float[Tensor, "T out in"]
    frame: Frame | None = None
    _means: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def means(self, t: int, dtype: torch.dtype) -> Float[Tensor, " in"]:
        """mu_t."""
        if (t, dtype) not in self._means:
            D = self.deltas[t]
            parts = [ALL] if D.dtype == dtype else column_parts(D)
            self._means[t, dtype] = torch.cat([self._mean(D[:, part].to(dtype)) for part in parts])
        return self._means[t, dtype]

    def _mean(self, D: Float[Tensor, "out some"]) -> Float[Tensor, " some"]:
        return D.mean(0) if self.frame is None else self.frame.rows.to(D.dtype) @ D / self.frame.shape[0]

    def __call__(self, t: int, dtype: torch.dtype, room: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """`C_t`, as `Experts` says."""
        D, mu = in_type(self.deltas[t][:, columns], dtype, room), self.means(t, dtype)[columns]
        if self.frame is None:
            return torch.sub(D, mu, out=room)
        return torch.addr(D, self.frame.rows.to(dtype), mu, alpha=-1, out=room)

    def second_moment_scales(self, weights: Float[Tensor, " T"], n: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """`a_t = w_t / z_t` with the energies n of the D_t; zero where every row is alike, to rounding, and there is
        nothing to normalise.
        """
        z = torch.stack([self._energy(t, energy) for t, energy in enumerate(n)])
        rounding = n * NULL**2
        return torch.where(z > rounding, weights / z, 0)

    def _energy(self, t: int, energy: Tensor) -> Tensor:
        """`||C||^2 = ||D||^2 - (2 out - 1^T 1) ||mu||^2`, from C itself where little would be left."""
        dtype = self.deltas.dtype
        count = float(self.deltas.shape[1])
        if self.frame is not None:
            count = 2 * self.frame.shape[0] - float(self.frame.rows.double().square().sum())
        left = energy - count * self.means(t, dtype).double().square().sum()
        return left if left > _CANCELLED * energy else energies(self(t, dtype)[None])[0]

    def add_mean_rows(self, total: Float[Tensor, "out in"], a: Float[Tensor, " T"]) -> Float[Tensor, "out in"]:
        """`total + 1 sum_t a_t mu_t^T S_t`, in place: `D_t S_t = C_t S_t + 1 mu_t^T S_t`, and `mu^T S = (C mu)^T C`."""
        one = torch.ones_like(total[:, 0]) if self.frame is None else self.frame.rows.to(total.dtype)
        rows = torch.zeros_like(total[0])
        for t, scale in enumerate(a.tolist()):
            D, mu = self.deltas[t].to(total.dtype), self.means(t, total.dtype)
            along = D @ mu - mu.dot(mu) * one  # C mu, (out,)
            rows.add_(along @ D - along.dot(one) * mu, alpha=scale)
        return total.add_(rows) if self.frame is None else total.addr_(one, rows)


def heterogeneity(n: Float[Tensor, " T"]) -> float | None:
    """`gamma = var(log n_t, unbiased) / mean(log n_t)^2`; None for one expert, where it is undefined."""
    if len(n) < 2:
        return None
    logs = torch.log(n + _TINY)
    return float(logs.var() / (logs.mean().square() + _TINY))
