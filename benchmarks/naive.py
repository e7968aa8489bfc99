"""The reference `ace` is timed against: the formula as the paper prints it, every matrix formed."""

from __future__ import annotations

import sys

import torch
from measure import Job, serve
from shapes import Case, task_vectors
from torch import Tensor


def naive(D: Tensor, hetero: bool, eps: float = 1e-5, k_frac: float = 0.3) -> Tensor:
    """ACE-Merging of (T, out, in): every Gram matrix, a general inverse, a full SVD."""
    T, rows, columns = D.shape
    n = torch.stack([(d**2).sum() for d in D])
    C = [d - d.mean(0, keepdim=True) for d in D]
    S = [c.T @ c for c in C]
    eye = torch.eye(columns)
    if hetero:
        z = [s.trace() for s in S]
        S = [s / t for s, t in zip(S, z, strict=True)]
        R = [s + eps / t * eye for s, t in zip(S, z, strict=True)]
    else:
        R = [s + eps * eye for s in S]
    c = torch.stack(S).sum(0).sum(0) / columns / (n.mean() if hetero else 1)
    total = torch.stack(R).sum(0)
    pre: Tensor = torch.stack([a @ b for a, b in zip(C, R, strict=True)]).sum(0) @ torch.linalg.inv(total + c)
    if not hetero:
        return pre
    res = torch.stack([d @ (s - total / T) for d, s in zip(D, S, strict=True)]).sum(0)
    U, s, Vh = torch.linalg.svd(res + pre, full_matrices=False)
    k = int(min(rows, columns) * k_frac)
    refined: Tensor = pre + s[:k].mean() * U[:, :k] @ Vh[:k]
    return refined


def prepare(case: Case) -> Job:
    if case.rule != "ace":
        raise ValueError(f"the naive formula is of ace, not {case.rule}")
    D = task_vectors(case.experts, case.rows, case.columns, case.hetero)
    return Job([lambda: naive(D, case.hetero)])


if __name__ == "__main__":
    serve(prepare, Case.from_json(sys.argv[1]))
