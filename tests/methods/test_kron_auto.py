"""kron_auto: what becomes of agreement and conflict, and how far its steps come.

That it is its formula where all directions are told apart: tests/methods/test_covariance_rules.py; where they are not:
tests/methods/test_both_sides.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, relative_error, svd, task_vectors
from torch import Tensor

import acemerge


def merged(deltas: Tensor, **options: Any) -> Tensor:
    """As exactly as the rule can."""
    return acemerge.merge_deltas(deltas, "kron_auto", **{**EXACT["kron_auto"], **options}).delta


# --- agreement and conflict ----------------------------------------------------------------------------------------


def test_the_agreement_is_the_squared_cosine_under_the_weights() -> None:
    deltas = task_vectors(3, (12, 9))
    found = acemerge.merge_deltas(deltas, "kron_auto", **EXACT["kron_auto"])
    inner = wanted = both = 0.0
    for D in deltas:
        U, s, Vh = svd(D)
        A, S = U * s @ U.T, Vh.T * s @ Vh
        A, S = A / A.diag().mean(), S / S.diag().mean()
        inner += float((found.delta * (A @ found.delta @ S)).sum())
        both += float((found.delta * (A @ D @ S)).sum())
        wanted += float((D * (A @ D @ S)).sum())
    assert found.stats["agreement"] == pytest.approx(both**2 / (inner * wanted), rel=1e-9)
    assert both / inner == pytest.approx(1 / found.stats["agreement"], rel=1e-9)  # the best factor, then the agreement


def test_one_expert_is_itself() -> None:
    deltas = task_vectors(1, (24, 16))
    found = acemerge.merge_deltas(deltas, "kron_auto", weights=[3.0])
    assert torch.equal(found.delta, deltas[0])
    assert found.stats["agreement"] == 1.0


def test_experts_apart_are_kept_and_equal_ones_are_one() -> None:
    """Up to what is faint: the pull is as strong as an update's own weight there."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (20, 18))
    core = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    apart = torch.stack([U[:, i : i + 4] @ core @ V[:, i : i + 4].T for i in (0, 4, 8)])
    assert relative_error(merged(apart), apart.sum(0)) < 1e-10
    assert relative_error(merged(apart[:1].repeat(3, 1, 1)), apart[0]) < 1e-10
    faint = apart.clone()
    faint[0] += 1e-2 * U[:, 12:16] @ core @ V[:, 12:16].T
    found = merged(faint)
    assert 1e-4 < relative_error(found, faint.sum(0)) < 1e-2


def test_conflict_is_scaled_down() -> None:
    """Two experts that want opposite things of one output for one input, beside one thing that both want."""
    U, _, Vh = svd(task_vectors(1, (20, 18))[0])
    same, other = torch.outer(U[:, 0], Vh[0]), torch.outer(U[:, 1], Vh[1])
    factors = []
    for conflict in (0.0, 0.5, 1.0, 2.0):
        deltas = torch.stack([same + conflict * other, same - conflict * other])
        found = acemerge.merge_deltas(deltas, "kron_auto", **EXACT["kron_auto"])
        assert abs(float((found.delta * other).sum())) < 1e-8
        factors.append(float((found.delta * same).sum()))
    assert factors[0] == pytest.approx(1.0, rel=1e-9)
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 0.3


def test_opposite_experts_leave_the_base() -> None:
    D = task_vectors(1, (24, 16))
    found = acemerge.merge_deltas(torch.cat([D, -D]), "kron_auto")
    assert not found.delta.any()
    assert (found.stats["status"], found.stats["agreement"]) == ("ok", 0.0)


# --- steps, residual, float32 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_steps_end_where_the_residual_is_small(steps: int) -> None:
    deltas = task_vectors(4, (40, 30))
    found = acemerge.merge_deltas(deltas, "kron_auto", steps=steps)
    assert found.stats["steps"] <= steps
    assert (found.stats["residual"] <= 1e-2) == (found.stats["status"] == "ok") == (steps == 30)
    if steps == 30:
        closer = acemerge.merge_deltas(deltas, "kron_auto", tol=1e-4)
        assert closer.stats["steps"] > found.stats["steps"]
        far, near = (relative_error(one.delta, merged(deltas)) for one in (found, closer))
        assert 10 * near < far < 3e-2


@pytest.mark.parametrize("shape", [(540, 520), (520, 540)], ids=str)
def test_a_large_layer_in_float32(shape: tuple[int, int]) -> None:
    deltas = task_vectors(3, shape, condition=100.0)
    options = {"tol": 1e-4, "steps": 100}
    found = acemerge.merge_deltas(deltas.float(), "kron_auto", **options)
    assert found.stats["status"] == "ok"
    assert relative_error(found.delta, acemerge.merge_deltas(deltas, "kron_auto", **options).delta) < 1e-4


def test_what_float32_would_hide_is_found_in_float64() -> None:
    """A layer of low rank, whose other singular values would be rounding, and many of them."""
    deltas = torch.stack(
        [task_vectors(1, (600, 24), seed=t)[0] @ task_vectors(1, (24, 560), seed=9)[0] for t in (1, 2)]
    )
    found = acemerge.merge_deltas(deltas.float(), "kron_auto", tol=1e-4)
    assert found.stats["status"] == "float64"
    assert relative_error(found.delta, acemerge.merge_deltas(deltas, "kron_auto", tol=1e-4).delta) < 1e-4


@pytest.mark.parametrize("factor", [1e-18, 1e-9, 1e18])
def test_very_small_and_large_updates_in_float32(factor: float) -> None:
    """Whose squares float32 does not hold."""
    deltas = task_vectors(3, (540, 520), condition=100.0).float()
    found = acemerge.merge_deltas(deltas * factor, "kron_auto")
    assert found.stats["status"] == "ok"
    expected = acemerge.merge_deltas(deltas, "kron_auto").delta.double()
    assert relative_error(found.delta.double() / factor, expected) < 1e-4


def test_experts_of_very_different_size_in_float32() -> None:
    deltas = task_vectors(3, (540, 520), condition=100.0).float()
    sizes = torch.tensor([1.0, 1e-17, 1e10])[:, None, None]
    found = acemerge.merge_deltas(deltas * sizes, "kron_auto")
    exact = acemerge.merge_deltas(deltas.double() * sizes.double(), "kron_auto")
    assert relative_error(found.delta, exact.delta) < 1e-4
