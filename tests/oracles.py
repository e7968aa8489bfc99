"""Slow, obvious float64 versions of the rules, written from the formulas as they are printed."""

from __future__ import annotations

import torch
from torch import Tensor


def ace(
    deltas: Tensor, weights: Tensor | None = None, eps: float = 1e-5, tau: float = 0.3, k_frac: float = 0.3,
    ablation: str = "E4",
) -> Tensor:  # fmt: skip
    """arXiv 2603.02945: every Gram matrix formed, a general inverse, a full SVD."""
    D = deltas.double()
    T, out, cols = D.shape
    w = torch.ones(T, dtype=torch.float64) if weights is None else weights.double()
    eye = torch.eye(cols, dtype=torch.float64)
    n = torch.stack([(d**2).sum() for d in D])
    logs = torch.log(n + 1e-12)
    hetero = T > 1 and ablation != "E1" and bool(logs.var() / (logs.mean() ** 2 + 1e-12) > tau)
    C = D - D.mean(1, keepdim=True)
    S = C.mT @ C
    z = torch.stack([s.trace() for s in S]) if hetero else torch.ones(T, dtype=torch.float64)
    S = w[:, None, None] * S / z[:, None, None]
    R = S + (w * eps / z)[:, None, None] * eye
    P = torch.zeros_like(eye)
    if ablation in ("E3", "E4"):
        c = S.sum(0).sum(0) / cols
        P = torch.ones(cols, 1, dtype=torch.float64) @ (c / n.mean() if hetero else c)[None]
    pre = (C @ R).sum(0) @ torch.linalg.inv(R.sum(0) + P)
    if not hetero or ablation != "E4":
        return pre
    res = (D @ (S - R.sum(0) / T)).sum(0)
    U, s, Vh = torch.linalg.svd(res + pre, full_matrices=False)
    k = int(min(out, cols) * k_frac)
    return pre if k == 0 else pre + s[:k].mean() * U[:, :k] @ Vh[:k]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; the plain norm where that is zero."""
    difference = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    return float(difference / scale if scale > 0 else difference)


def matrix_with_condition(out: int, cols: int, condition: float, generator: torch.Generator) -> Tensor:
    """A random (out, in) float64 matrix with singular values from 1 down to 1 / condition."""
    r = min(out, cols)
    U = torch.linalg.qr(torch.randn(out, r, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(cols, r, generator=generator, dtype=torch.float64))[0]
    return U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64) @ V.T
