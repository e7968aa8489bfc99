"""How far a merge moves weights beside the weights themselves: `trust`, and `kron_auto` where it knows the base."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import EXACT, relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.errors import UsageError

FREE = {"kron_auto": EXACT["kron_auto"], "trust": {"over": "task_arithmetic"}}
over_both = pytest.mark.parametrize("rule", sorted(FREE))


def base_of(shape: tuple[int, int], energy: float) -> Tensor:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return W * (energy**0.5 / W.norm())


def result(deltas: Tensor, rule: str, base: Tensor | None = None, **options: Any) -> acemerge.LayerResult:
    return acemerge.merge_deltas(deltas, rule, base=base, **{**FREE.get(rule, {}), **options})


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]], ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (6, 10)], ids=str)
@pytest.mark.parametrize("energy", [1e3, 0.3, 1e-3])
@over_both
def test_is_its_formula(rule: str, energy: float, shape: tuple[int, int], weights: list[float] | None) -> None:
    deltas, base = task_vectors(3, shape), base_of(shape, energy)
    found = result(deltas, rule, base, weights=weights, step=0.4)
    if rule == "trust":
        X = result(deltas, rule, weights=weights).delta
        expected = oracles.trust(X, deltas, base, weights, step=0.4)
        step = float(X.norm()) / oracles.weights_size(deltas, base, weights) ** 0.5
        assert found.stats["relative_step"] == pytest.approx(step, rel=1e-12)
    else:
        expected = oracles.kron_auto(deltas, weights, base=base, step=0.4)
    assert relative_error(found.delta, expected) < 1e-9


@over_both
def test_small_updates_are_what_they_are_without_a_base(rule: str) -> None:
    deltas = task_vectors(3, (12, 9))
    assert relative_error(result(deltas, rule, base_of((12, 9), 1e12)).delta, result(deltas, rule).delta) < 1e-9


@over_both
def test_no_update_is_longer_than_a_step(rule: str) -> None:
    """At right angles the experts want nothing in common: q is 1 - 1 / T."""
    deltas = torch.zeros(4, 12, 12, dtype=torch.float64)
    for t in range(4):
        deltas[t, 3 * t : 3 * t + 3, 3 * t : 3 * t + 3] = torch.eye(3) * 10
    base = base_of((12, 12), 1.0)
    size = oracles.weights_size(deltas, base) ** 0.5
    for step in (0.1, 0.25, 1.0):
        assert float(result(deltas, rule, base, step=step).delta.norm()) < step * size / 0.75**0.5


@over_both
def test_base_and_updates_together_scale_the_merge(rule: str) -> None:
    deltas, base = task_vectors(3, (12, 9)), base_of((12, 9), 0.2)
    small = result(deltas, rule, base).delta
    assert relative_error(result(1e-3 * deltas, rule, 1e-3 * base).delta, 1e-3 * small) < 1e-9


@over_both
def test_nobody_is_disturbed_where_all_want_the_same(rule: str) -> None:
    """One expert alone, beside one with next to no update, and three that are equal."""
    D, base = task_vectors(1, (12, 9), condition=1.0), base_of((12, 9), 1e-4)
    assert torch.equal(result(D, rule, base).delta, D[0])
    equal = result(D.repeat(3, 1, 1), rule, base)
    assert relative_error(equal.delta, result(D.repeat(3, 1, 1), rule).delta) < 1e-9
    faint = torch.cat([D, 1e-7 * task_vectors(1, (12, 9), seed=2)])
    assert relative_error(result(faint, rule, base).delta, result(faint, rule).delta) < 1e-6


@over_both
def test_a_base_of_zeros_is_measured_by_its_experts(rule: str) -> None:
    deltas = task_vectors(3, (12, 9))
    found = result(deltas, rule, torch.zeros(12, 9, dtype=torch.float64))
    mean = float(deltas.flatten(1).norm(dim=1).square().mean() ** 0.5)
    assert 0 < float(found.delta.norm()) < 0.25 * mean / oracles.dissent(deltas) ** 0.5


def test_rules_that_see_more_than_updates_are_refused() -> None:
    for over, what in (("slerp", "merges weights"), ("emr", "makes masks")):
        with pytest.raises(UsageError, match=what):
            acemerge.merge_deltas(task_vectors(2, (6, 5)), "trust", over=over)


@pytest.mark.parametrize(("rule", "parameter"), [("trust", "step"), ("kron_auto", "step"), ("cauchy", "tol")])
@pytest.mark.parametrize("value", [5e-324, 1e-200, 1e200, 1e308])
def test_a_constant_at_the_ends_of_float64_is_a_limit(rule: str, parameter: str, value: float) -> None:
    deltas, W0 = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)), torch.eye(6, 5)
    found, near = (result(deltas, rule, W0, **{parameter: v}).delta for v in (value, 1e-30 if value < 1 else 1e30))
    torch.testing.assert_close(found, near, rtol=1e-5, atol=1e-6)
