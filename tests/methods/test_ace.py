"""ACE against its printed formula, and what it does where the formula is undefined."""

from __future__ import annotations

import pytest
import torch
from crossed import crossed
from oracles import ace, matrix_with_condition, relative_error
from torch import Tensor

import acemerge
from acemerge.errors import UsageError
from acemerge.linalg.gram import energies
from acemerge.methods.ace import Centred


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SPREADS = {"homogeneous": [1.0, 1.1, 0.9, 1.0], "heterogeneous": [1.0, 5.0, 0.3, 2.0]}
SHAPES = [(24, 16), (16, 24), (20, 20), (3, 40), (600, 8), (8, 600), (540, 530)]


def _experts(shape: tuple[int, int], spread: str, seed: int = 0) -> Tensor:
    sizes = torch.tensor(SPREADS[spread], dtype=torch.float64)
    rank = max(1, min(shape) // 2)
    low = _randn(4, shape[0], rank, seed=seed) @ _randn(4, rank, shape[1], seed=seed + 1) / rank
    noise = 0.2 * _randn(4, *shape, seed=seed + 2)
    return 0.05 * sizes[:, None, None] * (low + noise)


@crossed(shape=SHAPES, spread=SPREADS, ablation=["E1", "E2", "E3", "E4"])
def test_ace_is_the_printed_formula(shape: tuple[int, int], spread: str, ablation: str) -> None:
    deltas = _experts(shape, spread)
    params = {"ablation": ablation, "tau": 0.0 if spread == "heterogeneous" else 1e9, "eps": 1e-3}
    result = acemerge.merge_deltas(deltas, "ace", **params)
    assert result.stats["branch"] == ("homogeneous" if ablation == "E1" else spread)
    assert relative_error(result.delta, ace(deltas, **params)) < 1e-8
    single = acemerge.merge_deltas(deltas.float(), "ace", **params)
    assert relative_error(single.delta, ace(deltas.float(), **params)) < 1e-4


@pytest.mark.parametrize("spread", SPREADS)
def test_ace_weights_multiply_the_second_moments(spread: str) -> None:
    deltas, weights = _experts((18, 12), spread), torch.tensor([1.0, 2.0, 0.5, 3.0])
    found = acemerge.merge_deltas(deltas, "ace", weights=weights.tolist(), tau=0.02, eps=1e-3).delta
    assert relative_error(found, ace(deltas, weights, tau=0.02, eps=1e-3)) < 1e-8


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
def test_ace_in_float32_stays_near_the_oracle_however_conditioned(shape: tuple[int, int], condition: float) -> None:
    generator = torch.Generator().manual_seed(2)
    deltas = torch.stack([matrix_with_condition(*shape, condition, generator) for _ in range(3)]).float()
    result = acemerge.merge_deltas(deltas, "ace")
    assert relative_error(result.delta, ace(deltas)) < 1e-5


def test_ace_says_when_it_fell_back_to_float64() -> None:
    generator = torch.Generator().manual_seed(2)
    deltas = torch.stack([matrix_with_condition(64, 96, 1e6, generator) for _ in range(3)]).float()
    assert acemerge.merge_deltas(deltas, "ace").stats["status"] == "float64"
    assert acemerge.merge_deltas(deltas, "ace", eps=1.0).stats["status"] == "ok"


def test_a_frozen_expert_drops_out_of_ace() -> None:
    deltas = _experts((12, 9), "heterogeneous")
    frozen = torch.cat([deltas, torch.zeros_like(deltas[:1])])
    assert torch.equal(acemerge.merge_deltas(frozen, "ace").delta, acemerge.merge_deltas(deltas, "ace").delta)


def test_ace_without_ridge_uses_the_pseudo_inverse_on_singular_input() -> None:
    deltas = _randn(2, 4, 9)  # 8 directions in 9
    result = acemerge.merge_deltas(deltas, "ace", eps=0.0)
    assert result.stats["status"] == "pseudo-inverse"
    assert result.stats["rank"] < 9
    near = acemerge.merge_deltas(deltas, "ace", eps=1e-9).delta
    assert relative_error(result.delta, near) < 1e-5


def test_ace_refuses_negative_weights() -> None:
    with pytest.raises(UsageError, match="negative"):
        acemerge.merge_deltas(_randn(2, 3, 3), "ace", weights=[1, -1])


def test_rows_that_are_alike_but_for_rounding_have_no_scale() -> None:
    """Their centred energy is rounding, and one over it would outweigh every other expert."""
    row, eye = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    alike = row.repeat(3, 1)
    assert (alike - alike.mean(0)).any()
    deltas = torch.stack([alike, alike * (1 + 1e-7 * eye), alike * (1 + 1e-5 * eye), eye])
    for given in (deltas, deltas.float()):
        scales = Centred(given).second_moment_scales(torch.ones(4, dtype=torch.float64), energies(given))
        assert (scales > 0).tolist() == [False, False, True, True]


def test_columns_of_a_centred_expert_are_those_of_all_of_it() -> None:
    """In float64 its means come from a few columns at a time, and are not the ones that float32 had."""
    deltas = _randn(2, 5, 1100).float() + 3
    centred = Centred(deltas)
    exact = deltas.double() - deltas.double().mean(1, keepdim=True)
    torch.testing.assert_close(centred(1, torch.float32), exact[1].float(), rtol=0, atol=2e-6)
    for columns in (slice(None), slice(500, 1030)):
        torch.testing.assert_close(centred(1, torch.float64, columns=columns), exact[1][:, columns], rtol=0, atol=1e-14)
