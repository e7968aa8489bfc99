"""Task vectors that a rule must bear, and what it must make of each."""

from __future__ import annotations

import json

import torch
from conformance import result
from oracles import matrix_with_condition
from torch import Tensor

from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_condition(condition: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([matrix_with_condition(24, 16, condition, generator) for _ in range(3)])


AWKWARD: dict[str, Tensor] = {
    "one expert": _randn(1, 6, 5),
    "equal experts": _randn(1, 6, 5).repeat(3, 1, 1),
    "all zero": torch.zeros(3, 6, 5, dtype=torch.float64),
    "one frozen expert": torch.cat([_randn(2, 6, 5), torch.zeros(1, 6, 5, dtype=torch.float64)]),
    "one row": _randn(3, 1, 7),
    "one column": _randn(3, 7, 1),
    "one entry": _randn(3, 1, 1),
    "equal rows": _randn(3, 1, 5).repeat(1, 6, 1) * torch.tensor([1.0, 9.0, 80.0])[:, None, None],
    "rank one": _randn(3, 6, 1) @ _randn(3, 1, 5, seed=1),
    "condition 1e12": _with_condition(1e12),
    "identical but for scale": _randn(1, 6, 5) * torch.tensor([1.0, 2.0, -3.0])[:, None, None],
    "opposite experts": _randn(1, 6, 5) * torch.tensor([1.0, -1.0])[:, None, None],
    "more experts than rows": _randn(7, 3, 4),
    "k of zero": _randn(3, 2, 2) * torch.tensor([1.0, 9.0, 80.0])[:, None, None],
    "tiny": 1e-20 * _randn(3, 6, 5),
    "huge": 1e9 * _randn(3, 6, 5),
    "very unequal": _randn(3, 6, 5) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None],
}


def check_finite(name: str, case: str, dtype: torch.dtype) -> None:
    """A finite result of the right shape and type, and plain numbers that tell of it."""
    found = result(AWKWARD[case].to(dtype), name)
    assert found.delta.shape == AWKWARD[case].shape[1:]
    assert found.delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(found.delta).all()
    assert found.stats.statuses
    assert all(isinstance(status, Status) for status in found.stats.statuses)
    said = json.dumps(found.stats.to_json())  # plain numbers, strings and lists
    assert json.dumps(LayerStats.from_json(json.loads(said)).to_json()) == said


def check_repeats(name: str, case: str, dtype: torch.dtype) -> None:
    """The input is left alone, and gives the same again."""
    deltas = AWKWARD[case].to(dtype)
    before = deltas.clone()
    first = result(deltas, name).delta
    assert torch.equal(deltas, before)
    assert torch.equal(result(deltas, name).delta, first)
