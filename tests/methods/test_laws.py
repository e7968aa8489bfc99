"""Metamorphic laws, in float64, for the rules that tests/support/conformance.py states them for."""

from __future__ import annotations

import pytest
import torch
from conformance import RULES, accepted, having, merged, result, rotation
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import relative_error
from torch import Tensor


@st.composite
def task_vectors(draw: st.DrawFn, most: int = 10) -> Tensor:
    """(T, out, in) float64 task vectors whose energies differ by up to two orders of magnitude."""
    T, out, cols = (draw(st.integers(1, top)) for top in (5, most, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = torch.logspace(0, draw(st.floats(0, 1)), T, dtype=torch.float64)
    return sizes[:, None, None] * torch.randn(T, out, cols, generator=generator, dtype=torch.float64)


def slack(deltas: Tensor, name: str) -> float:
    """1e-12, times what the rule's solve or singular vectors amplify rounding by: their condition number.

    Never more than 1e-6, so that no draw lets everything pass.
    """
    stats = result(deltas, name, **dict(RULES[name].params)).stats
    spread = torch.linalg.cond(deltas).max().item() * torch.linalg.cond(deltas.sum(0)).item() * crowding(deltas)
    return min(1e-6, 1e-12 * max(1.0, stats.get("condition", 1.0), spread if RULES[name].rank else 1.0))


def crowding(deltas: Tensor) -> float:
    """How near to dependent the experts' leading singular vectors are, which tsv_m and iso_cts make orthogonal."""
    U, _, Vh = torch.linalg.svd(deltas, full_matrices=False)
    k = max(1, min(deltas.shape[1:]) // len(deltas))
    sides = torch.cat([*U[:, :, :k]], 1), torch.cat([*Vh[:, :k]], 0)
    return max(torch.linalg.cond(side).item() for side in sides)


def differs(found: Tensor, expected: Tensor, deltas: Tensor) -> float:
    """The relative error; where experts cancel and nothing but rounding of them is left, none."""
    if (found - expected).norm() < 1e-14 * deltas.norm():
        return 0.0
    return relative_error(found, expected)


@pytest.mark.parametrize("name", having("order"))
@given(task_vectors(), st.randoms(use_true_random=False))
def test_the_order_of_experts_is_irrelevant(name: str, deltas: Tensor, random: object) -> None:
    deltas = accepted(deltas, name)
    order = list(range(len(deltas)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert differs(merged(deltas[order], name), merged(deltas, name), deltas) < slack(deltas, name)


@pytest.mark.parametrize("name", having("scales"))
@given(task_vectors(), st.floats(0.125, 8))
def test_scaling_the_task_vectors_scales_the_merge(name: str, deltas: Tensor, factor: float) -> None:
    scaled = factor * merged(deltas, name)
    assert differs(merged(factor * deltas, name), scaled, factor * deltas) < slack(deltas, name)


@pytest.mark.parametrize("name", having("rotates"))
@given(st.integers(0, 2**31), st.sampled_from([(9, 6), (6, 9), (8, 8), (4, 15)]), st.integers(1, 4))
def test_rotating_inputs_and_outputs_rotates_the_merge(name: str, seed: int, shape: tuple[int, int], T: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = accepted(torch.randn(T, *shape, generator=generator, dtype=torch.float64), name)
    assume(torch.linalg.cond(deltas.sum(0)) < 1e3)
    left, right = rotation(shape[0], generator), rotation(shape[1], generator)
    rotated = left @ merged(deltas, name) @ right
    assert relative_error(merged(left @ deltas @ right, name), rotated) < slack(deltas, name)


@pytest.mark.parametrize("name", having("returns"))
@given(task_vectors(), st.integers(1, 4))
def test_equal_experts_give_the_expert_back(name: str, deltas: Tensor, count: int) -> None:
    expert = deltas[:1]
    given_back = merged(expert.repeat(count, 1, 1), name)
    assert relative_error(given_back, expert[0]) < 1e-12 * torch.linalg.cond(expert[0]).item() ** 2


@pytest.mark.parametrize("name", having("drops"))
@given(task_vectors(most=6))
def test_an_expert_without_update_is_not_there(name: str, deltas: Tensor) -> None:
    assume(len(deltas) < RULES[name].experts)
    frozen = torch.cat([deltas, torch.zeros_like(deltas[:1])])
    assert relative_error(merged(frozen, name), merged(deltas, name)) < 1e-12


@pytest.mark.parametrize("name", RULES)
@given(task_vectors(), st.floats(-3, 3))
def test_scale_multiplies_the_result(name: str, deltas: Tensor, scale: float) -> None:
    once = merged(deltas, name, scale=1.0)
    assert relative_error(merged(deltas, name, scale=scale), scale * once) < 1e-12


@pytest.mark.parametrize("name", RULES)
@given(task_vectors())
def test_weights_of_one_change_nothing(name: str, deltas: Tensor) -> None:
    deltas = accepted(deltas, name)
    assert torch.equal(merged(deltas, name, weights=[1.0] * len(deltas)), merged(deltas, name))


@pytest.mark.parametrize(
    "name", [name for name in RULES if RULES[name].experts > 2 and name not in ("consensus", "cart")]
)
@given(task_vectors())
def test_an_expert_of_weight_zero_is_not_there(name: str, deltas: Tensor) -> None:
    extra = torch.cat([deltas, 7 * deltas[:1].flip(1)])
    weighted = merged(extra, name, weights=[1.0] * len(deltas) + [0.0])
    assert relative_error(weighted, merged(deltas, name)) < slack(deltas, name)


@pytest.mark.parametrize("name", RULES)
@given(task_vectors())
def test_no_update_gives_no_update(name: str, deltas: Tensor) -> None:
    assert merged(torch.zeros_like(deltas), name).abs().max() == 0


@given(task_vectors(), st.floats(0.25, 4))
def test_ace_scales_when_its_ridge_scales_too(deltas: Tensor, factor: float) -> None:
    """eps is in units of the squared update; gamma is not scale-free, so the branch is fixed."""
    plain = merged(deltas, "ace", eps=1e-2, tau=1e9)
    scaled = merged(factor * deltas, "ace", eps=1e-2 * factor**2, tau=1e9)
    assert relative_error(scaled, factor * plain) < 1e-9


@given(task_vectors())
def test_ace_ignores_the_order_of_inputs_and_outputs(deltas: Tensor) -> None:
    """Centring and the prior row break rotations but not permutations."""
    rows, columns = torch.arange(deltas.shape[1]).flip(0), torch.arange(deltas.shape[2]).flip(0)
    permuted = merged(deltas[:, rows][:, :, columns], "ace", eps=1e-2)
    assert relative_error(permuted, merged(deltas, "ace", eps=1e-2)[rows][:, columns]) < 1e-9
