"""What every rule must bear, whatever it is given. The rules and their traits: tests/support/conformance.py."""

from __future__ import annotations

import pytest
import torch
from conformance import RULES, accepted, having, measurements, result
from crossed import crossed
from every_rule import AWKWARD, check_finite, check_repeats
from oracles import relative_error
from torch import Tensor

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.methods import make


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# One for each way through a rule: experts left out, a singular sum, more experts than they have room for.
WAYS = ["one frozen expert", "rank one", "more experts than rows"]
REPEATED = [case if case in WAYS else pytest.param(case, id=case, marks=pytest.mark.torture) for case in AWKWARD]


@crossed(name=RULES, case=AWKWARD, dtype=DTYPES)
def test_is_finite_and_reports_its_status(name: str, case: str, dtype: torch.dtype) -> None:
    check_finite(name, case, dtype)


@crossed(name=RULES, case=REPEATED, dtype=DTYPES)
def test_leaves_its_input_alone_and_repeats_itself(name: str, case: str, dtype: torch.dtype) -> None:
    check_repeats(name, case, dtype)


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_is_accumulated_in_float32(name: str) -> None:
    deltas = _randn(8, 12, 10).bfloat16()
    found = result(deltas, name).delta
    exact = result(deltas.double(), name).delta
    assert relative_error(found, exact) < 1e-4


@pytest.mark.parametrize("name", RULES)
def test_compute_dtype_can_be_chosen(name: str) -> None:
    deltas = _randn(2, 6, 5).float()
    found = result(deltas, name, compute_dtype=torch.float64).delta
    assert found.dtype == torch.float64
    assert torch.equal(found, result(deltas.double(), name).delta)


@pytest.mark.parametrize("name", RULES)
def test_bad_arguments_are_named(name: str) -> None:
    deltas = _randn(2, 3, 3)
    given = measurements(deltas, name)
    with pytest.raises(UsageError, match=r"did you mean `scale`"):
        acemerge.merge_deltas(deltas, name, **given, scal=2)
    with pytest.raises(UsageError, match="scale"):
        acemerge.merge_deltas(deltas, name, **given, scale="much")
    with pytest.raises(UsageError, match="3 weights for 2 experts"):
        acemerge.merge_deltas(deltas, name, **given, weights=[1, 2, 3])
    with pytest.raises(UsageError, match="shape"):
        acemerge.merge_deltas(torch.zeros(0, 3, 3), name, **given)
    with pytest.raises(CheckpointError, match="not finite"):
        acemerge.merge_deltas(torch.full((2, 3, 3), float("nan")), name, **given)


@pytest.mark.parametrize("name", having("rank"))
def test_a_rule_that_solves_or_truncates_reports_its_rank(name: str) -> None:
    for deltas in (_randn(3, 9, 6), _randn(3, 6, 9)):
        rank = result(deltas, name).stats["rank"]
        assert isinstance(rank, int)
        assert 0 < rank <= 18


@pytest.mark.parametrize("name", RULES)
def test_vectors_and_stacks_go_through_rules_that_need_no_matrix(name: str) -> None:
    vector = accepted(_randn(2, 12), name)
    if make(name, {}).needs.matrix:
        with pytest.raises(UsageError, match="needs matrices"):
            acemerge.merge_deltas(vector, name)
    else:
        merged = acemerge.merge_deltas(vector, name, **measurements(vector, name)).delta
        assert merged.shape == (12,)
        if name not in ("arcee_fusion", "dare_linear", "dare_ties", "della", "emr", "ties"):
            stack = vector.view(-1, 2, 3, 2)
            stacked = acemerge.merge_deltas(stack, name, **measurements(stack, name)).delta
            assert relative_error(stacked.flatten(), merged) < 1e-14


def test_the_table_holds_every_rule() -> None:
    assert set(RULES) == set(acemerge.METHODS)


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean `average`"):
        acemerge.merge_deltas(_randn(2, 3, 3), "averag")


def test_average_refuses_weights_that_cancel() -> None:
    with pytest.raises(UsageError, match="sum to zero"):
        acemerge.merge_deltas(_randn(2, 3, 3), "average", weights=[1, -1])
