"""Metamorphic laws, true to 1e-12 in float64 for the rules they are stated for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import acemerge
from oracles import relative_error

LINEAR = ["average", "task_arithmetic"]
INTERPOLATING = ["average"]
settings.register_profile("acemerge", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("acemerge")


@st.composite
def task_vectors(draw: st.DrawFn, most: int = 10) -> Tensor:
    """(T, out, in) float64 task vectors whose energies differ by up to two orders of magnitude."""
    T, out, cols = (draw(st.integers(1, top)) for top in (5, most, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = torch.logspace(0, draw(st.floats(0, 1)), T, dtype=torch.float64)
    return sizes[:, None, None] * torch.randn(T, out, cols, generator=generator, dtype=torch.float64)


rules = st.sampled_from(sorted(acemerge.METHODS))


def merged(deltas: Tensor, name: str, **params: object) -> Tensor:
    return acemerge.merge_deltas(deltas, name, **params).delta


@given(rules, task_vectors(), st.randoms(use_true_random=False))
def test_the_order_of_experts_is_irrelevant(name: str, deltas: Tensor, random: object) -> None:
    order = list(range(len(deltas)))
    random.shuffle(order)  # type: ignore[attr-defined]
    # Sums in another order round differently; a small ridge amplifies that by at most the condition number.
    tolerance = 1e-12 * max(1.0, acemerge.merge_deltas(deltas, name).stats.get("condition", 1.0))
    assert relative_error(merged(deltas[order], name), merged(deltas, name)) < tolerance


@given(st.sampled_from(LINEAR), task_vectors(), st.floats(-8, 8))
def test_scaling_the_task_vectors_scales_the_merge(name: str, deltas: Tensor, factor: float) -> None:
    assert relative_error(merged(factor * deltas, name), factor * merged(deltas, name)) < 1e-12


@given(task_vectors(), st.floats(0.25, 4))
def test_ace_scales_when_its_ridge_scales_too(deltas: Tensor, factor: float) -> None:
    """eps is in units of the squared update; gamma is not scale-free, so the branch is fixed."""
    plain = merged(deltas, "ace", eps=1e-2, tau=1e9)
    scaled = merged(factor * deltas, "ace", eps=1e-2 * factor**2, tau=1e9)
    assert relative_error(scaled, factor * plain) < 1e-9


@given(rules, task_vectors(), st.floats(-3, 3))
def test_scale_multiplies_the_result(name: str, deltas: Tensor, scale: float) -> None:
    assert relative_error(merged(deltas, name, scale=scale), scale * merged(deltas, name, scale=1.0)) < 1e-12


@given(st.sampled_from(INTERPOLATING), task_vectors(), st.integers(1, 4))
def test_equal_experts_give_the_expert_back(name: str, deltas: Tensor, count: int) -> None:
    expert = deltas[:1]
    assert relative_error(merged(expert.repeat(count, 1, 1), name), expert[0]) < 1e-12


@given(rules, task_vectors())
def test_weights_of_one_change_nothing(name: str, deltas: Tensor) -> None:
    weighted = acemerge.merge_deltas(deltas, name, weights=[1.0] * len(deltas)).delta
    assert torch.equal(weighted, merged(deltas, name))


@given(st.sampled_from(["average", "ace"]), task_vectors())
def test_an_expert_of_weight_zero_is_not_there(name: str, deltas: Tensor) -> None:
    extra = torch.cat([deltas, 7 * deltas[:1].flip(1)])
    weighted = acemerge.merge_deltas(extra, name, weights=[1.0] * len(deltas) + [0.0]).delta
    assert relative_error(weighted, merged(deltas, name)) < 1e-12


@given(rules, task_vectors())
def test_no_update_gives_no_update(name: str, deltas: Tensor) -> None:
    assert merged(torch.zeros_like(deltas), name).abs().max() == 0


@given(task_vectors())
def test_ace_ignores_the_order_of_inputs_and_outputs(deltas: Tensor) -> None:
    """Centring and the prior row break rotations but not permutations."""
    rows, columns = torch.arange(deltas.shape[1]).flip(0), torch.arange(deltas.shape[2]).flip(0)
    permuted = merged(deltas[:, rows][:, :, columns], "ace", eps=1e-2)
    assert relative_error(permuted, merged(deltas, "ace", eps=1e-2)[rows][:, columns]) < 1e-9
