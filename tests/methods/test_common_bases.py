"""knots and core_space, which merge in bases that the experts have in common, against their formulas."""

from __future__ import annotations

from collections.abc import Sequence

import oracles
import pytest
import torch
from crossed import crossed, named
from oracles import relative_error, svd, task_vectors
from torch import Tensor

import acemerge
from acemerge.errors import UsageError


def left_vectors(deltas: Tensor) -> Tensor:
    """The left singular vectors of the task vectors side by side, those of zeros left out."""
    U, s, _ = svd(torch.cat(list(deltas), 1))
    return U[:, s > 1e-12 * s[0]]


def low_rank(out: int, columns: int, ranks: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(out, r, generator=generator), torch.randn(r, columns, generator=generator)) for r in ranks]
    return torch.stack([U.double() @ V.double() for U, V in parts])


INPUTS = {
    "full rank": task_vectors(3, (12, 9)),
    "wide": task_vectors(2, (6, 15)),
    "low rank": low_rank(20, 16, (2, 3, 2)),
}


@pytest.mark.parametrize("deltas", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.5]], ids=["", "weighted"])
def test_knots_merges_the_rows_of_the_common_svd(deltas: Tensor, weights: list[float] | None) -> None:
    weights = weights and weights[: len(deltas)]
    U = left_vectors(deltas)
    expected = U @ oracles.ties(U.T @ deltas, weights)
    assert relative_error(acemerge.merge_deltas(deltas, "knots", weights=weights).delta, expected) < 1e-9


@crossed(deltas=named(INPUTS), weights=[None, [2.0, 0.5, 1.5]], over=["iso_c", "ties"])
def test_core_space_merges_in_both_common_bases(deltas: Tensor, weights: list | None, over: str) -> None:
    oracle = {"iso_c": oracles.iso_c, "ties": oracles.ties}[over]
    weights = weights and weights[: len(deltas)]
    U, V = left_vectors(deltas), left_vectors(deltas.mT)
    expected = U @ oracle(U.T @ deltas @ V, weights) @ V.T
    found = acemerge.merge_deltas(deltas, "core_space", over=over, weights=weights)
    assert relative_error(found.delta, expected) < 1e-9
    assert found.stats["rank"] == min(U.shape[1], V.shape[1])


@pytest.mark.parametrize("rule", ["knots", "core_space"])
def test_nothing_is_lost_on_the_way(rule: str) -> None:
    deltas = task_vectors(4, (12, 9), condition=1e6)
    found = acemerge.merge_deltas(deltas, rule, over="average", scale=2.0, weights=[1.0, 0.5, 2.0, 0.0]).delta
    assert relative_error(found, 2 * oracles.average(deltas, [1.0, 0.5, 2.0, 0.0])) < 1e-12


@pytest.mark.parametrize("rule", ["knots", "core_space"])
@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("slerp", "merges weights"),
        ("emr", "makes masks"),
        ("averag", "did you mean `average`"),
        ({"name": "ties", "scale": 2}, "has a scale"),
        ({"name": "ties", "keep": 3}, "keep"),
    ],
)
def test_the_rule_inside_is_checked(rule: str, over: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        acemerge.merge_deltas(task_vectors(2, (4, 3)), rule, over=over)
