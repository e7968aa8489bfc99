"""The system that `kron` and `kron_auto` solve: the directions that it tells apart, and its preconditioner.

That the rules are their formulas: tests/methods/test_covariance_rules.py.
"""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from crossed import crossed
from oracles import EXACT, relative_error, svd, task_vectors, two_sides
from torch import Tensor

import acemerge
from acemerge.linalg.two_sided import conjugate_gradients, pooled_inverse, spiked_sides, spiked_sum
from acemerge.methods import both_sides

over_both = pytest.mark.parametrize("rule", ["kron", "kron_auto"])
over_shapes = pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20), (40, 3)], ids=str)


def merged(deltas: Tensor, rule: str, **options: Any) -> Tensor:
    return acemerge.merge_deltas(deltas, rule, **{**EXACT[rule], **options}).delta


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directions are the fewest, as small layers would be told apart whole."""
    monkeypatch.setattr(both_sides, "_FEWEST", 2)


# --- the directions that are told apart ----------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
@crossed(rule=["kron", "kron_auto"], shape=[(24, 16), (16, 24), (20, 20), (40, 3)], keep=[0.0, 0.25, 0.8, 1.0])
def test_beyond_the_leading_directions_all_are_alike(rule: str, shape: tuple[int, int], keep: float) -> None:
    deltas, weights = task_vectors(4, shape), [2.0, 0.5, 1.0, 3.0]
    expected = getattr(oracles, rule)(deltas, weights, keep=keep, fewest=2)
    assert relative_error(merged(deltas, rule, weights=weights, keep=keep), expected) < 1e-8


@over_both
def test_a_quarter_of_the_directions_is_told_apart_and_64_at_least(rule: str) -> None:
    deltas, options = task_vectors(2, (300, 280)), {"tol": 1e-6}
    default = acemerge.merge_deltas(deltas, rule, **options).delta
    assert torch.equal(merged(deltas, rule, keep=70 / 280, **options), default)
    assert relative_error(merged(deltas, rule, keep=69 / 280, **options), default) > 1e-6
    fewest = merged(deltas, rule, keep=0.0, **options)
    assert torch.equal(fewest, merged(deltas, rule, keep=64 / 280, **options))
    assert relative_error(merged(deltas, rule, keep=65 / 280, **options), fewest) > 1e-6


@pytest.mark.usefixtures("few")
@over_both
def test_equal_singular_values_have_no_spikes(rule: str) -> None:
    U, _, Vh = svd(task_vectors(3, (20, 20)))
    deltas = U @ Vh
    assert relative_error(merged(deltas, rule), getattr(oracles, rule)(deltas, fewest=2)) < 1e-8


@over_both
def test_experts_of_differing_rank_are_solved_together(rule: str) -> None:
    deltas = task_vectors(3, (30, 28)).clone()
    U, s, Vh = svd(deltas[1:])
    deltas[1:] = U[..., :2] * s[:, None, :2] @ Vh[:, :2]
    assert relative_error(merged(deltas, rule), getattr(oracles, rule)(deltas)) < 1e-9


@pytest.mark.usefixtures("few")
@over_both
@over_shapes
def test_a_weight_of_two_is_the_expert_twice(rule: str, shape: tuple[int, int]) -> None:
    deltas = task_vectors(3, shape)
    twice = torch.cat([deltas, deltas[1:2]])
    assert relative_error(merged(deltas, rule, weights=[1.0, 2.0, 1.0]), merged(twice, rule)) < 1e-10


@pytest.mark.usefixtures("few")
@over_both
def test_the_transposes_give_the_transpose(rule: str) -> None:
    deltas = task_vectors(3, (24, 16))
    assert relative_error(merged(deltas.mT, rule).mT, merged(deltas, rule)) < 1e-10


# --- the preconditioner --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 28), (40, 20), (100, 8)], ids=str)
@pytest.mark.parametrize("k", [5, 30], ids=["spiked", "whole"])
def test_the_preconditioner_is_its_formula(shape: tuple[int, int], k: int) -> None:
    deltas, X = task_vectors(4, shape), task_vectors(1, shape, seed=1)[0]
    found = pooled_inverse(_spiked(deltas, k), [0.5] * 4, 0.6)(X)
    L, R = (sum(each) / 2 + 0.6 * torch.eye(len(each[0])).double() for each in zip(*two_sides(deltas, k), strict=True))
    assert relative_error(found, torch.linalg.inv(L) @ X @ torch.linalg.inv(R)) < 1e-9


@pytest.mark.parametrize("shape", [(60, 50), (120, 40)], ids=str)
def test_the_preconditioner_saves_two_fifths_of_the_steps(shape: tuple[int, int]) -> None:
    deltas = task_vectors(4, shape)
    sides = _spiked(deltas, 50)
    summed = spiked_sum(sides)

    def applied(X: Tensor) -> Tensor:
        return 0.4 * X + summed(X)

    B = summed(deltas[0])
    alone = conjugate_gradients(applied, lambda X: X, B, 500, 1e-6)
    helped = conjugate_gradients(applied, pooled_inverse(sides, [0.5] * 4, 0.4**0.5), B, 500, 1e-6)
    assert relative_error(helped.X, alone.X) < 1e-4
    assert helped.steps < 0.6 * alone.steps


@pytest.mark.parametrize("sizes", [(30, 28), (300, 100)], ids=str)
def test_fewer_directions_are_as_if_no_more_had_been_kept(sizes: tuple[int, int]) -> None:
    deltas = task_vectors(2, (30, 28))
    for many, few in zip(_spiked(deltas, 20, sizes), _spiked(deltas, 5, sizes), strict=True):
        found = many.leading(5, sizes)
        assert found.floors == pytest.approx(few.floors, rel=1e-12)
        assert relative_error(found.P, few.P) < 1e-12
        assert relative_error(found.Q, few.Q) < 1e-12
        assert many.leading(20, sizes) is many


@pytest.mark.parametrize("shape", [(30, 28), (100, 40)], ids=["whole", "in the space of the factors"])
def test_rounded_products_precondition_as_well(shape: tuple[int, int]) -> None:
    deltas, X = task_vectors(4, shape).float(), task_vectors(1, shape, seed=1)[0].float()
    sides = _spiked(deltas, 8, dtype=torch.float32)
    exact, rounded = (pooled_inverse(sides, [0.5] * 4, 0.6, products)(X) for products in (None, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, exact) < 0.02


def _spiked(
    deltas: Tensor, k: int, sizes: tuple[int, int] | None = None, dtype: torch.dtype = torch.float64
) -> list[Any]:
    found = [spiked_sides(D, sizes or tuple(D.shape), 1.0, k, dtype) for D in deltas]
    return [one[0] for one in found if one is not None]
