"""Compressed first, then merged: adapters in the two spaces that hold most of all of them."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error, svd

import acemerge
from acemerge.linalg.lowrank import LowRank
from acemerge.linalg.shared import shared_spaces
from acemerge.methods import Layer, make
from acemerge.methods.compressed import merge_compressed

SHAPE = (30, 20)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(T: int = 3, rank: int = 3) -> LowRank:
    left = tuple((t + 1) * randn(SHAPE[0], rank, seed=t) for t in range(T))
    return LowRank(left, tuple(randn(rank, SHAPE[1], seed=10 + t) for t in range(T)))


def merged(given: LowRank, rule: str, rank: int, weights: list[float] | None = None) -> acemerge.LowRankResult:
    T = len(given.left)
    layer = Layer(torch.tensor(weights or [1.0] * T, dtype=torch.float64), tuple(range(T)))
    return merge_compressed(make(rule, {}), given, layer, torch.float64, rank)


@pytest.mark.parametrize("rule", ["average", "task_arithmetic", "actmat"])
def test_with_room_for_all_directions_the_merge_is_that_of_the_updates(rule: str) -> None:
    given = updates()
    expected = acemerge.merge_deltas(given.full(torch.float64), rule).delta
    assert relative_error(merged(given, rule, 40).delta(), expected) < 1e-8


@pytest.mark.parametrize("rule", ["average", "ties", "tsv_m", "ace", "kron_auto", "dare_ties"])
def test_the_rank_is_there_by_construction_and_nothing_is_cut(rule: str) -> None:
    found = merged(updates(), rule, 4)
    assert found.left.shape == (SHAPE[0], 4)
    assert found.right is not None
    assert found.right.shape == (4, SHAPE[1])
    assert found.truncated(4).stats.energy_lost < 1e-12


def test_the_spaces_hold_more_than_those_of_either_side_alone() -> None:
    D = updates().full(torch.float64)
    units = D / D.flatten(1).norm(dim=1)[:, None, None]
    P, Q = shared_spaces(D, 4)
    sides = svd(torch.cat(list(units), 1))[0][:, :4], svd(torch.cat(list(units)))[2][:4].T
    held, of_sides = ((left.T @ units @ right).square().sum() for left, right in ((P, Q), sides))
    assert held > of_sides
    for X in (P, Q):
        assert (X.T @ X - torch.eye(4)).abs().max() < 1e-12
    turned = shared_spaces(7 * D.flip(0), 4)  # sizes and order have no say
    assert relative_error(turned[0] @ turned[0].T, P @ P.T) < 1e-6


def test_an_expert_of_weight_zero_has_no_say_in_the_spaces() -> None:
    given = updates()
    two = LowRank(given.left[:2], given.right[:2])
    found = merged(given, "task_arithmetic", 3, [1.0, 1.0, 0.0]).delta()
    assert relative_error(found, merged(two, "task_arithmetic", 3).delta()) < 1e-6


def test_no_update_gives_no_update() -> None:
    none = LowRank(tuple(torch.zeros(SHAPE[0], 2, dtype=torch.float64) for _ in range(2)), updates(2, 2).right)
    assert merged(none, "average", 2).delta().abs().sum() == 0


def test_equal_adapters_of_the_rank_come_back() -> None:
    one = updates(1)
    same = LowRank(one.left * 3, one.right * 3)
    assert relative_error(merged(same, "average", 3).delta(), one.full(torch.float64)[0]) < 1e-10
