"""Inputs on which rounding might decide, and what every rule makes of them.

As a script, `python awkward.py FILE`, it saves all results.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from conformance import RULES, merged
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(T: int, out: int, columns: int, rank: int) -> Tensor:
    return randn(T, out, rank) @ randn(T, rank, columns, seed=1)


def _inputs() -> dict[str, Tensor]:
    A, D = randn(3, 16, seed=1), randn(1, 12, 9)
    sizes = torch.tensor([1.0, 0.3, 0.09], dtype=torch.float64)[:, None, None]
    nested = torch.stack([randn(20, r, seed=r) @ A[:r] for r in (3, 2, 1)])
    return {
        "duplicates": D.repeat(3, 1, 1),
        "duplicates but for scale": D * torch.tensor([1.0, 2.0, -3.5])[:, None, None],
        "opposite": torch.cat([D, -D]),
        "two opposite and a third": torch.cat([D, -D, low_rank(1, 12, 9, 2)]),
        "a zero expert": torch.cat([randn(2, 12, 9), torch.zeros_like(D)]),
        "one row": randn(3, 1, 9),
        "one column": randn(3, 9, 1),
        "low rank": low_rank(3, 20, 16, 3),
        "low rank, wide": low_rank(3, 16, 30, 3),
        "low rank, sizes apart": low_rank(3, 20, 16, 2) * sizes,
        "duplicates of low rank": low_rank(1, 12, 9, 3).repeat(3, 1, 1),
        "one row space": randn(3, 20, 3) @ randn(3, 3, 3, seed=7) @ A,
        "one column space": randn(20, 3) @ randn(3, 3, 16, seed=1),
        "rows within one another's space": nested,
        "columns that sum to zero": (X := randn(3, 20, 16)) - X.mean(1, keepdim=True),
        "rows that sum to zero": X - X.mean(2, keepdim=True),
        "rows that sum to zero, of low rank": (L := low_rank(3, 20, 16, 3)) - L.mean(2, keepdim=True),
        "equal rows": randn(3, 1, 9).repeat(1, 8, 1),
        "equal columns": randn(3, 9, 1).repeat(1, 1, 8),
        "more experts than rows": randn(7, 3, 4),
    }


INPUTS = {name: D / D.flatten(1).norm(dim=1).amax() for name, D in _inputs().items()}
# By default conjugate gradients end at 1e-2, one step sooner or later.
_SOLVED = {name: {"steps": 200, "tol": 1e-12} for name in ("kron", "kron_auto", "kfac")}
_SOLVED["cauchy"] = {"steps": 8, "stop": 1e-12}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, _SOLVED.get(name, {})) for name in RULES),
    ("ace", {"eps": 1e-2, "tau": -1.0}),
    ("iso_cts", {"common": 0.5}),
    ("cauchy", {"over": {"name": "ace", "eps": 1e-2}, "side": "output", **_SOLVED["cauchy"]}),
    ("dc_merge", {"top": 0.3, "smooth": "linear"}),
    ("svc", {"over": "tsv_m"}),
    ("svc", {"over": {"name": "ace", "eps": 1e-2}}),
    ("knots", {"over": {"name": "ace", "eps": 1e-2}}),
    ("core_space", {"over": "ties"}),
    ("core_space", {"over": {"name": "ace", "eps": 1e-2}}),
    ("ties", {"trim": "tensor", "keep": 0.5}),
]


def noisy(x: Tensor, size: float, seed: int = 0) -> Tensor:
    """Every entry off by about this share, in x's type."""
    return (x.double() * (1 + size * randn(*x.shape, seed=seed))).to(x.dtype)


def jump(found: Tensor, expected: Tensor, deltas: Tensor) -> float:
    """How far apart two results are, against them and what they are made of."""
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + deltas.double().norm()))


def all_results() -> dict[str, Tensor]:
    return {
        f"{name} {params} {case}": merged(D, name, **params) for name, params in VARIANTS for case, D in INPUTS.items()
    }


if __name__ == "__main__":
    torch.save(all_results(), sys.argv[1])
