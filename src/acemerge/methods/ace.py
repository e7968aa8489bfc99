"""ACE-Merging: adaptive covariance estimation from the task vectors alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.errors import UsageError
from acemerge.linalg.gram import NormalEquations, energies, symmetric_product
from acemerge.linalg.solve import Diagnosis, invert, with_rank_one
from acemerge.linalg.spectral import leading_polar
from acemerge.methods.base import LayerResult
from acemerge.methods.elementwise import Scale, weighted_sum
from acemerge.shapes import Float, Tensor

_TINY = 1e-12  # added inside the log and to the denominator of gamma


@dataclass(frozen=True)
class Ace:
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
    directions of the refinement add nothing. `eps` is in units of the squared update: the paper uses
    4e-2 for GPT-2, 2e-4 for RoBERTa-base and 1e-5 for all others. A weight multiplies S_t and R_t.

    Raises UsageError for negative weights.
    """

    name: ClassVar[str] = "ace"
    source: ClassVar[str] = "arXiv 2603.02945"
    requires_matrix: ClassVar[bool] = True

    eps: Annotated[float, Field(ge=0, allow_inf_nan=False, description="ridge on every second moment")] = 1e-5
    tau: Annotated[float, Field(description="heterogeneous branch when gamma is above it")] = 0.3
    k_frac: Annotated[float, Field(ge=0, le=1, description="share of the spectrum that is refined")] = 0.3
    ablation: Annotated[
        Literal["E1", "E2", "E3", "E4"],
        Field(description="E1 closed form, E2 + normalisation, E3 + prior, E4 + refinement (all)"),
    ] = "E4"
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], weights: Float[Tensor, " T"]) -> LayerResult:
        if (weights < 0).any():
            raise UsageError("ace", "an expert has a negative weight", "use weights of zero or more")
        n = energies(deltas)
        active = (n > 0) & (weights > 0)
        if not active.any():
            return LayerResult(torch.zeros_like(deltas[0]), {"status": "no update"})
        if not active.all():
            deltas, weights, n = deltas[active], weights[active], n[active]
        gamma = heterogeneity(n)
        hetero = self.ablation != "E1" and gamma is not None and gamma > self.tau
        terms = self._terms(deltas, weights, n, hetero)
        refined = int(self.k_frac * min(deltas.shape[1:])) if hetero and self.ablation == "E4" else 0
        M, diagnosis, trusted = self._closed_form(deltas, terms, refined, deltas.dtype)
        status: str = diagnosis.status
        if not trusted:
            del M
            M, diagnosis, _ = self._closed_form(deltas, terms, refined, torch.float64)
            status = "float64" if diagnosis.status == "ok" else diagnosis.status
        stats: dict[str, Any] = {
            "status": status,
            "gamma": gamma,
            "branch": "heterogeneous" if hetero else "homogeneous",
            "eps": self.eps,
            "condition": diagnosis.condition,
            "rank": diagnosis.rank,
            "refined": refined,
        }
        return LayerResult((self.scale * M).to(deltas.dtype), stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        refine = 4 * rows * columns * min(rows, columns) if self.ablation == "E4" else 0
        if _prefers_dual(experts, rows, columns):
            stacked = experts * rows
            return stacked**2 * columns + stacked**3 // 3 + 2 * rows * stacked * (stacked + columns) + refine
        per_expert = rows * columns * (columns + (3 * rows if rows < columns else 2 * columns))
        return experts * per_expert + columns**3 // 3 + 2 * rows * columns**2 + refine

    def _terms(self, deltas: Tensor, weights: Tensor, n: Tensor, hetero: bool) -> _Terms:
        """The scalars of every expert: `w_t` or `w_t / z_t`, and its ridge."""
        scales = weights
        if hetero:
            z = torch.stack([energies((D - D.mean(0))[None])[0] for D in deltas])
            scales = torch.where(z > 0, weights / z, 0)  # every row alike: nothing to normalise
        with_prior = self.ablation in ("E3", "E4")
        prior = 1 / (n.mean().item() if hetero else 1.0) if with_prior else None
        return _Terms(scales, self.eps * scales, prior)

    def _closed_form(
        self, deltas: Tensor, terms: _Terms, refined: int, dtype: torch.dtype
    ) -> tuple[Tensor, Diagnosis, bool]:
        """M, what is known of its system matrix and whether it can be trusted, all in `dtype`."""
        solve = _solve_dual if _prefers_dual(*deltas.shape) else _solve_primal
        pre, residual, diagnosis, trusted = solve(deltas, terms, dtype)
        if refined and trusted:
            sum_of_both = residual().add_(pre)
            del residual  # and with it the system matrix
            leading = leading_polar(sum_of_both, refined)
            pre = pre.add_(leading.polar, alpha=float(leading.singular_values.mean()))
        return pre, diagnosis, trusted


@dataclass(frozen=True)
class _Terms:
    """`a_t`, the factor on S_t; `e_t`, its ridge, both (T,); the factor on the prior row, None without it."""

    scales: Float[Tensor, " T"]
    ridges: Float[Tensor, " T"]
    prior: float | None


# pre, the function that gives res = sum_t D_t (S_t - Rbar), the diagnosis, whether pre can be trusted
_Solved = tuple[Tensor, Callable[[], Tensor], Diagnosis, bool]


def _prefers_dual(experts: int, rows: int, columns: int) -> bool:
    """Fewer rows in all task vectors together than columns: the dual system is smaller, and of full rank."""
    return experts * rows < columns


def _solve_primal(deltas: Tensor, terms: _Terms, dtype: torch.dtype) -> _Solved:
    """In the input space: A (in, in), running sums over the experts."""
    in_features = deltas.shape[2]
    equations = NormalEquations.zeros_like(deltas[0], dtype)
    A, B = equations.gram, equations.target  # sum_t a_t S_t, sum_t a_t C_t S_t
    mean_row = torch.zeros(in_features, dtype=dtype, device=deltas.device)  # sum_t a_t mu_t^T S_t
    for D, scale in zip(deltas, terms.scales.tolist(), strict=True):
        mu = D.to(dtype).mean(0)  # (in,)
        C = D.to(dtype) - mu  # (out, in)
        equations.add(C, C, scale)
        mean_row.add_((C @ mu) @ C, alpha=scale)
    prior = None if terms.prior is None else A.sum(0) * (terms.prior / in_features)  # c, (in,)
    A.diagonal().add_(terms.ridges.sum().item())  # A is now sum_t R_t
    ridged = weighted_sum(deltas, terms.ridges).to(dtype)  # sum_t e_t D_t
    target = B + (ridged - ridged.mean(0))  # sum_t C_t R_t
    inverse = invert(A)
    Y = inverse(target)
    trusted = inverse.diagnosis.trusts(A, target, Y)
    del target
    if prior is not None:
        Y = with_rank_one(Y, inverse(prior[None])[0])

    def residual() -> Tensor:
        total = deltas.sum(0).to(dtype)
        return torch.addmm(B.add_(mean_row), total, A, alpha=-1 / len(deltas))

    return Y, residual, inverse.diagnosis, trusted


def _solve_dual(deltas: Tensor, terms: _Terms, dtype: torch.dtype) -> _Solved:
    """In the space of all rows: with F = stack_t sqrt(a_t) C_t (N, in), N = T out, and e = sum_t e_t,
    `H F (F^T F + e I)^(-1) = H (F F^T + e I)^(-1) F`. F itself is never formed: centring acts on the products.
    """
    T, out, in_features = deltas.shape
    roots = terms.scales.sqrt().to(dtype)  # (T,)
    per_row = roots.repeat_interleave(out)  # (N,)
    products = _row_products(deltas, dtype).view(T, out, T, out)  # D D^T
    products -= products.mean(3, keepdim=True)  # D C^T
    all_D = products.sum(0).view(out, -1) * per_row  # (sum_t D_t) F^T, (out, N)
    own_D = torch.cat([products[t, :, t] * roots[t] for t in range(T)], 1)  # sqrt(a_t) D_t C_t^T side by side
    products -= products.mean(1, keepdim=True)  # C C^T
    own_C = torch.cat([products[t, :, t] * roots[t] for t in range(T)], 1)
    # a_t C_t S_t + e_t C_t = (sqrt(a_t) C_t C_t^T + e_t / sqrt(a_t) I) F_t
    ridge_roots = (terms.ridges / terms.scales.sqrt()).nan_to_num_().to(dtype).tolist()
    eye = torch.eye(out, dtype=dtype, device=deltas.device)
    H = own_C + torch.cat([ridge * eye for ridge in ridge_roots], 1)  # (out, N)
    K = products.view(T * out, T * out).mul_(per_row).mul_(per_row[:, None])  # F F^T
    ridge = terms.ridges.sum().item()
    K.diagonal().add_(ridge)
    inverse = invert(K)
    Q = inverse(H)
    trusted = inverse.diagnosis.trusts(K, H, Q)
    Y = _times_centred(Q * per_row, deltas, dtype)
    if terms.prior is not None:
        sums = deltas.sum(2, dtype=dtype)  # D 1, (T, out)
        sums = (sums - sums.mean(1, keepdim=True)).view(-1) * per_row  # F 1, (N,)
        row = inverse((sums * (terms.prior / in_features))[None])  # c^T A^(-1) = (F 1)^T K^(-1) F / in
        Y = with_rank_one(Y, _times_centred(row * per_row, deltas, dtype)[0])

    def residual() -> Tensor:
        mixed = _times_centred((own_D - all_D / T) * per_row, deltas, dtype)
        return mixed.sub_(deltas.sum(0).to(dtype), alpha=ridge / T)

    return Y, residual, inverse.diagnosis, trusted


def _row_products(deltas: Float[Tensor, "T out in"], dtype: torch.dtype) -> Float[Tensor, "N N"]:
    """`D D^T` of all rows of all experts, without a copy of them in `dtype`."""
    if deltas.dtype == dtype:
        return symmetric_product(deltas.reshape(-1, deltas.shape[2]).T)
    return torch.cat([torch.cat([D.to(dtype) @ E.to(dtype).T for E in deltas], 1) for D in deltas])


def _times_centred(
    Q: Float[Tensor, "m N"], deltas: Float[Tensor, "T out in"], dtype: torch.dtype
) -> Float[Tensor, "m in"]:
    """`Q stack_t C_t = sum_t (Q_t J) D_t`: the centring J = I - 1 1^T / out moves to the small factor."""
    centred = Q.view(len(Q), len(deltas), -1)
    centred = centred - centred.mean(2, keepdim=True)  # (m, T, out)
    total = torch.zeros(len(Q), deltas.shape[2], dtype=dtype, device=deltas.device)
    for t, D in enumerate(deltas):
        total.addmm_(centred[:, t], D.to(dtype))
    return total


def heterogeneity(n: Float[Tensor, " T"]) -> float | None:
    """`gamma = var(log n_t, unbiased) / mean(log n_t)^2`; None for one expert, where it is undefined."""
    if len(n) < 2:
        return None
    logs = torch.log(n + _TINY)
    return float(logs.var() / (logs.mean().square() + _TINY))
