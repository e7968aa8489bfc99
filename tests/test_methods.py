"""The conformance table: what every rule must bear, and ACE against its printed formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import acemerge
from acemerge.errors import CheckpointError, UsageError
from oracles import ace, matrix_with_condition, relative_error

RULES = sorted(acemerge.METHODS)


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
    "k of zero": _randn(3, 2, 2) * torch.tensor([1.0, 9.0, 80.0])[:, None, None],
    "tiny": 1e-20 * _randn(3, 6, 5),
    "huge": 1e9 * _randn(3, 6, 5),
    "very unequal": _randn(3, 6, 5) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_is_finite_and_reports_its_status(self, name: str, case: str, dtype: torch.dtype) -> None:
        result = acemerge.merge_deltas(AWKWARD[case].to(dtype), name)
        assert result.delta.shape == AWKWARD[case].shape[1:]
        assert result.delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(result.delta).all()
        assert isinstance(result.stats["status"], str)

    def test_leaves_its_input_alone_and_repeats_itself(self, name: str, case: str, dtype: torch.dtype) -> None:
        deltas = AWKWARD[case].to(dtype)
        before = deltas.clone()
        first = acemerge.merge_deltas(deltas, name).delta
        assert torch.equal(deltas, before)
        assert torch.equal(acemerge.merge_deltas(deltas, name).delta, first)


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_is_accumulated_in_float32(name: str) -> None:
    deltas = _randn(8, 12, 10).bfloat16()
    found = acemerge.merge_deltas(deltas, name).delta
    exact = acemerge.merge_deltas(deltas.double(), name).delta
    assert relative_error(found, exact) < 1e-4


@pytest.mark.parametrize("name", RULES)
def test_compute_dtype_can_be_chosen(name: str) -> None:
    result = acemerge.merge_deltas(_randn(3, 6, 5).float(), name, compute_dtype=torch.float64)
    assert result.delta.dtype == torch.float64


@pytest.mark.parametrize("name", RULES)
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(UsageError, match=r"did you mean `scale`"):
        acemerge.merge_deltas(_randn(2, 3, 3), name, scal=2)
    with pytest.raises(UsageError, match="scale"):
        acemerge.merge_deltas(_randn(2, 3, 3), name, scale="much")
    with pytest.raises(UsageError, match="3 weights for 2 experts"):
        acemerge.merge_deltas(_randn(2, 3, 3), name, weights=[1, 2, 3])
    with pytest.raises(UsageError, match="shape"):
        acemerge.merge_deltas(torch.zeros(0, 3, 3), name)
    with pytest.raises(CheckpointError, match="not finite"):
        acemerge.merge_deltas(torch.full((2, 3, 3), float("nan")), name)


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean `average`"):
        acemerge.merge_deltas(_randn(2, 3, 3), "averag")


# --- ace against its formula ---------------------------------------------------------------------------------

SPREADS = {"homogeneous": [1.0, 1.1, 0.9, 1.0], "heterogeneous": [1.0, 5.0, 0.3, 2.0]}
SHAPES = [(24, 16), (16, 24), (20, 20), (3, 40), (600, 8), (8, 600), (540, 530)]


def _experts(shape: tuple[int, int], spread: str, seed: int = 0) -> Tensor:
    sizes = torch.tensor(SPREADS[spread], dtype=torch.float64)
    rank = max(1, min(shape) // 2)
    low = _randn(4, shape[0], rank, seed=seed) @ _randn(4, rank, shape[1], seed=seed + 1) / rank
    noise = 0.2 * _randn(4, *shape, seed=seed + 2)
    return 0.05 * sizes[:, None, None] * (low + noise)


@pytest.mark.parametrize("ablation", ["E1", "E2", "E3", "E4"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def test_average_refuses_weights_that_cancel() -> None:
    with pytest.raises(UsageError, match="sum to zero"):
        acemerge.merge_deltas(_randn(2, 3, 3), "average", weights=[1, -1])


def test_a_registered_rule_is_usable_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses
    from typing import ClassVar

    @dataclasses.dataclass(frozen=True)
    class First:
        """The first expert's update."""

        name: ClassVar[str] = "first"
        source: ClassVar[str] = "this test"
        requires_matrix: ClassVar[bool] = False
        scale: float = 1.0

        def merge(self, deltas: Tensor, weights: Tensor) -> acemerge.LayerResult:
            return acemerge.LayerResult(self.scale * deltas[0], {"status": "ok"})

        def operations(self, experts: int, rows: int, columns: int) -> int:
            return 0

    monkeypatch.setattr("acemerge.methods.METHODS", dict(acemerge.METHODS))
    acemerge.register(First)
    deltas = _randn(2, 3, 3)
    assert torch.equal(acemerge.merge_deltas(deltas, "first", scale=2.0).delta, 2 * deltas[0])
