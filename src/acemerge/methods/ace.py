"""ACE-Merging: adaptive covariance estimation from the task vectors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.errors import UsageError
from acemerge.linalg.gram import NormalEquations, energies
from acemerge.linalg.solve import Solution, solve_right
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
        layer = self._solve(deltas, weights, n, hetero)
        status: str = layer.solution.status
        if not layer.solution.trusted:
            layer = self._solve(deltas, weights, n, hetero, torch.float64)
            status = "float64" if layer.solution.status == "ok" else layer.solution.status
        M = layer.solution.value
        k = int(self.k_frac * min(M.shape)) if hetero and self.ablation == "E4" else 0
        if k > 0:
            leading = leading_polar(layer.residual(deltas) + M, k)
            M = M + leading.singular_values.mean() * leading.polar
        stats: dict[str, Any] = {
            "status": status,
            "gamma": gamma,
            "branch": "heterogeneous" if hetero else "homogeneous",
            "eps": self.eps,
            "condition": layer.solution.condition,
            "rank": layer.solution.rank,
            "refined": k,
        }
        return LayerResult((self.scale * M).to(deltas.dtype), stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        short = min(rows, columns)
        per_expert = rows * columns * (columns + (3 * rows if rows < columns else 2 * columns))
        solve = columns**3 // 3 + 2 * rows * columns**2
        refine = 2 * rows * columns * (columns + short) + 4 * short**3 if self.ablation == "E4" else 0
        return experts * per_expert + solve + refine

    def _solve(
        self, deltas: Tensor, weights: Tensor, n: Tensor, hetero: bool, dtype: torch.dtype | None = None
    ) -> _Layer:
        """The closed form `pre`, by running sums over the experts, in `dtype`."""
        dtype = dtype or deltas.dtype
        in_features = deltas.shape[2]
        equations = NormalEquations.zeros_like(deltas[0], dtype)
        mean_row = torch.zeros(in_features, dtype=dtype, device=deltas.device)  # sum_t w_t mu_t^T S_t
        ridges = torch.zeros_like(weights)
        for t, D in enumerate(deltas):
            mu = D.to(dtype).mean(0)  # (in,)
            C = D.to(dtype) - mu  # (out, in)
            z = energies(C[None]).item() if hetero else 1.0
            if z == 0:  # every row alike: nothing left to normalise
                continue
            weight = weights[t].item() / z
            ridges[t] = self.eps * weight
            equations.add(C, C, weight)
            mean_row.add_((C @ mu) @ C, alpha=weight)
        A, B = equations.gram, equations.target
        prior = None
        if self.ablation in ("E3", "E4"):
            prior = A.sum(0) / (in_features * (n.mean().item() if hetero else 1.0))  # c, (in,)
        ridge_target = weighted_sum(deltas, ridges).to(dtype)  # sum_t e_t D_t, centred below
        R = A + ridges.sum() * torch.eye(in_features, dtype=dtype, device=A.device)
        solution = solve_right(R, B + (ridge_target - ridge_target.mean(0)), prior)
        return _Layer(solution, B + mean_row, R)


@dataclass(frozen=True)
class _Layer:
    solution: Solution
    uncentred_target: Float[Tensor, "out in"]  # sum_t D_t S_t
    ridged_gram: Float[Tensor, "in in"]  # sum_t R_t

    def residual(self, deltas: Float[Tensor, "T out in"]) -> Float[Tensor, "out in"]:
        """`res = sum_t D_t (S_t - Rbar)`, with uncentred D_t and unregularised S_t."""
        total = deltas.sum(0).to(self.ridged_gram.dtype)
        return torch.addmm(self.uncentred_target, total, self.ridged_gram, alpha=-1 / len(deltas))


def heterogeneity(n: Float[Tensor, " T"]) -> float | None:
    """`gamma = var(log n_t, unbiased) / mean(log n_t)^2`; None for one expert, where it is undefined."""
    if len(n) < 2:
        return None
    logs = torch.log(n + _TINY)
    return (logs.var() / (logs.mean().square() + _TINY)).item()
