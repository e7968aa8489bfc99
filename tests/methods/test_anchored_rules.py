"""anchored and kron: what becomes of the sum of the updates, and how far kron's steps come.

That they are their formulas: test_covariance_rules.py. The laws that other rules share: test_laws.py.
"""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import EXACT, relative_error, svd, task_vectors
from torch import Tensor

import acemerge
from acemerge.methods.base import Workspace

BOTH = ["anchored", "kron"]
SHAPES = [(24, 16), (16, 24), (20, 20), (40, 3)]
over_both = pytest.mark.parametrize("rule", BOTH)
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def merged(deltas: Tensor, rule: str, **options: Any) -> Tensor:
    """As exactly as the rule can."""
    return acemerge.merge_deltas(deltas, rule, **{**EXACT.get(rule, {}), **options}).delta


def apart(inputs: bool, outputs: bool) -> Tensor:
    """Three experts of rank 4 in 20 x 18, turned, that share no input direction, no output direction, or neither."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (20, 18))
    deltas = []
    for t in range(3):
        rows, columns = 4 * t * outputs, 4 * t * inputs
        core = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        deltas.append(U[:, rows : rows + 4] @ core @ V[:, columns : columns + 4].T)
    return torch.stack(deltas)


# --- between the sum and the least-squares fit -------------------------------------------------------------------


@over_both
@over_shapes
def test_a_strong_pull_gives_the_sum(rule: str, shape: tuple[int, int]) -> None:
    deltas, weights = task_vectors(3, shape), [2.0, 0.5, 1.0]
    found = merged(deltas, rule, lam=1e12, weights=weights)
    assert relative_error(found, oracles.weighted(deltas, weights).sum(0)) < 1e-9
    assert relative_error(merged(deltas, rule, weights=weights), found) > 1e-2


@pytest.mark.parametrize("p", [0, 1, 2])
@over_shapes
def test_anchored_without_a_pull_is_the_fit(p: int, shape: tuple[int, int]) -> None:
    deltas = task_vectors(3, shape)
    fit = oracles.actmat(deltas, p=p)
    assert relative_error(merged(deltas, "anchored", lam=0, p=p), fit) < 1e-8
    if 3 * shape[0] >= shape[1]:
        assert relative_error(merged(deltas, "anchored", lam=1e-12, p=p), fit) < 1e-6


@pytest.mark.parametrize(
    ("rule", "inputs", "outputs"),
    [
        ("anchored", True, True),
        ("anchored", True, False),
        ("kron", True, True),
        ("kron", True, False),
        ("kron", False, True),
    ],
)
def test_experts_in_subspaces_of_their_own_are_kept_whole(rule: str, inputs: bool, outputs: bool) -> None:
    deltas = apart(inputs, outputs)
    assert relative_error(merged(deltas, rule), deltas.sum(0)) < 1e-7
    shared = apart(False, False)
    assert relative_error(merged(shared, rule), shared.sum(0)) > 0.1


def test_experts_in_subspaces_of_their_own_need_no_step() -> None:
    found = acemerge.merge_deltas(apart(True, True), "kron")
    assert (found.stats["status"], found.stats["steps"]) == ("ok", 0)


@over_both
@over_shapes
@pytest.mark.parametrize("T", [2, 5])
def test_equal_experts_give_one_where_it_is_energetic_and_all_where_it_is_faint(
    rule: str, shape: tuple[int, int], T: int
) -> None:
    D = task_vectors(1, shape)[0]
    U, s, Vh = svd(D)
    energy = s.square()
    if rule == "kron":
        energy, pull = energy * D.numel() / s.sum() ** 2, 0.1
    else:
        pull = energy.sum() / shape[1]
    factors = (energy + T * pull) / (energy + pull)
    assert relative_error(merged(D.expand(T, -1, -1), rule), U * (s * factors) @ Vh) < 1e-10


@over_shapes
def test_a_weight_of_two_is_the_expert_twice(shape: tuple[int, int]) -> None:
    deltas = task_vectors(3, shape)
    twice = torch.cat([deltas, deltas[1:2]])
    assert relative_error(merged(deltas, "anchored", weights=[1.0, 2.0, 1.0]), merged(twice, "anchored")) < 1e-10


# --- steps, residual, status ---------------------------------------------------------------------------------------


def roots(D: Tensor) -> tuple[Tensor, Tensor]:
    """A and S of the formula."""
    U, s, Vh = svd(D.double())
    A, S = U * s @ U.T, Vh.T * s @ Vh
    return A / A.diag().mean(), S / S.diag().mean()


def residual(deltas: Tensor, M: Tensor, lam: float = 0.1) -> Tensor:
    """What is left of `sum_t A_t D_t S_t + l sum_t D_t` when M is put in on the left."""
    left = sum(A @ (D - M) @ S for D, (A, S) in zip(deltas.double(), map(roots, deltas), strict=True))
    return left + lam * len(deltas) * (deltas.double().sum(0) - M)


@pytest.mark.parametrize("shape", [(40, 30), (60, 20), (20, 60), (100, 8)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_the_residual_that_is_told_is_the_residual(shape: tuple[int, int], steps: int) -> None:
    deltas = task_vectors(4, shape)
    found = acemerge.merge_deltas(deltas, "kron", steps=steps, tol=1e-3)
    share = residual(deltas, found.delta).norm() / residual(deltas, deltas.sum(0)).norm()
    assert found.stats["residual"] == pytest.approx(float(share), rel=1e-6)
    assert found.stats["steps"] <= steps
    assert found.stats["status"] == ("ok" if share <= 1e-3 else "not converged")
    assert (found.stats["status"] == "ok") == (steps == 30)


@pytest.mark.parametrize("shape", [(520, 60), (60, 520)], ids=str)
def test_a_large_layer_in_float32(shape: tuple[int, int]) -> None:
    deltas = task_vectors(3, shape).float()
    found = acemerge.merge_deltas(deltas, "kron", tol=2e-5, steps=60)
    assert found.stats["status"] == "ok"
    share = residual(deltas, found.delta.double()).norm() / residual(deltas, deltas.double().sum(0)).norm()
    assert float(share) < 4e-5  # the recurrence's, and what rounding adds
    finest = acemerge.merge_deltas(deltas, "kron", tol=9e-6).delta  # which asks for float64
    assert torch.equal(finest, acemerge.merge_deltas(deltas.double(), "kron", tol=9e-6).delta.float())


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(520, 60), (60, 520)], ids=str)
def test_the_residual_of_products_in_bfloat16_is_that_of_float32(shape: tuple[int, int], tol: float) -> None:
    deltas = task_vectors(3, shape).float()
    found = acemerge.merge_deltas(deltas, "kron", products="bfloat16", tol=tol, steps=100)
    share = residual(deltas, found.delta.double()).norm() / residual(deltas, deltas.double().sum(0)).norm()
    assert found.stats["residual"] == pytest.approx(float(share), abs=2e-6)  # the rounding of float32
    assert found.stats["status"] == "ok"
    assert share <= tol
    assert not torch.equal(found.delta, acemerge.merge_deltas(deltas, "kron", tol=tol, steps=100).delta)


def test_products_in_bfloat16_bear_a_pull_too_weak_for_a_cholesky_factor() -> None:
    deltas = task_vectors(2, (600, 30)).float()
    found = acemerge.merge_deltas(deltas, "kron", products="bfloat16", lam=1e-20)
    assert found.delta.isfinite().all()
    assert found.stats["residual"] < 1.0


def test_small_layers_have_no_products_in_bfloat16() -> None:
    deltas = task_vectors(3, (40, 30)).float()
    found = [acemerge.merge_deltas(deltas, "kron", products=products).delta for products in ("float32", "bfloat16")]
    assert torch.equal(*found)


def test_memory_is_counted_by_expert_and_longer_side() -> None:
    work = Workspace(2, 3, "longer", each=4)
    assert work.entries(5, 100, 10) == work.entries(5, 10, 100) == (2 + 4 * 5) * 1000 + 3 * 50**2
    assert work.entries(50, 100, 10) == (2 + 4 * 50) * 1000 + 3 * 100**2
