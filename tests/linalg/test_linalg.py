"""The numerics against slow, obvious float64 versions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import matrix_with_condition, relative_error
from torch import Tensor

from acemerge.linalg.gram import NormalEquations, energies, symmetric_product
from acemerge.linalg.least_squares import least_squares
from acemerge.linalg.problem import Problem, prefers_dual
from acemerge.linalg.rounding import NULL
from acemerge.linalg.select import kth_largest_magnitude
from acemerge.linalg.solve import SMALL_ERROR_TOLERANCE, invert, rounding_error, with_rank_one
from acemerge.linalg.spectral import inverse_root, leading_polar, leading_singular, polar

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 5), (40, 513), (700, 1030), (1, 600)], ids=str)
def test_symmetric_product(shape: tuple[int, int]) -> None:
    x = randn(*shape)
    found = symmetric_product(x)
    assert torch.equal(found, found.T)
    assert relative_error(found, x.T @ x) < 1e-14
    assert relative_error(symmetric_product(x.T), x @ x.T) < 1e-14  # a transposed view


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (600, 540), (540, 600)], ids=str)
def test_normal_equations(shape: tuple[int, int]) -> None:
    X, Z = randn(3, *shape), randn(3, *shape)
    for sources in (X, Z):
        equations = NormalEquations(*shape, torch.float64, torch.device("cpu"))
        for x, z, w in zip(X, sources, (1.0, 0.5, 2.0), strict=True):
            equations.add(x, x if sources is X else z, w)
        weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[:, None, None]
        A, B = equations.sums()
        assert torch.equal(A, A.T)
        assert relative_error(A, (weights * (sources.mT @ sources)).sum(0)) < 1e-13
        assert relative_error(B, (weights * (X @ sources.mT @ sources)).sum(0)) < 1e-13


@pytest.mark.parametrize("shape", [(30, 12), (600, 540)], ids=str)
def test_normal_equations_from_an_origin(shape: tuple[int, int]) -> None:
    """The expert that is the origin itself is in A alone; a room may be the target's own memory."""
    X = randn(3, *shape)
    given, room = X.clone(), torch.empty(shape, dtype=torch.float64)
    equations = NormalEquations(*shape, torch.float64, torch.device("cpu"))
    equations.add(given[0], given[0], 2.0, origin=given[0])
    equations.add(given[1], given[1], 0.5, 0.7, given[0], room)
    assert torch.equal(given, X)
    equations.add(given[2], given[2], 1.5, 0.0, given[0], given[2])
    A, B = equations.sums()
    G = X.mT @ X
    assert relative_error(A, 2.0 * G[0] + 0.5 * G[1] + 1.5 * G[2]) < 1e-13
    eye = torch.eye(shape[1], dtype=torch.float64)
    expected = (X[1] - X[0]) @ (0.5 * G[1] + 0.7 * eye) + (X[2] - X[0]) @ (1.5 * G[2])
    assert relative_error(B, expected) < 1e-13


@pytest.mark.parametrize("shape", [(2, 1000, 1000), (2, 7), (2,), (2, 3, 4, 5), (2, 0)], ids=str)
def test_energies(shape: tuple[int, ...]) -> None:
    deltas = torch.full(shape, 1e-3, dtype=torch.float32)
    expected = [deltas[0].numel() * 1e-6] * 2
    assert energies(deltas).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_invert_and_the_prior_row(condition: float) -> None:
    square = matrix_with_condition(40, 40, condition**0.5, GENERATOR)
    A, B, prior = square.T @ square, randn(25, 40), randn(40).abs()
    inverse = invert(A)
    assert (inverse.diagnosis.regular, inverse.diagnosis.rank) == (True, 40)
    assert inverse.diagnosis.condition == pytest.approx(condition, rel=0.7)
    Y = inverse(B)
    assert relative_error(Y, torch.linalg.solve(A, B.T).T) < 1e-8
    with_prior = with_rank_one(Y, inverse(prior[None])[0])
    assert relative_error(with_prior, torch.linalg.solve((A + prior).T, B.T).T) < 1e-8


def test_the_error_estimate_bounds_the_error_of_float32() -> None:
    """What the fallback to float64 rests on: never below the true error, never fifty times above it."""
    trusted = set()
    for out, cols in [(64, 64), (200, 120), (120, 200)]:
        for condition, size in [(1e1, 1.0), (1e1, 1e-4), (1e2, 1e-4), (1e3, 1e-4)]:
            D = matrix_with_condition(out, cols, condition, GENERATOR).float()
            ridge = size * torch.eye(cols)
            A, B = D.T @ D + ridge, D @ (D.T @ D)
            exact_gram = D.double().T @ D.double()
            exact = torch.linalg.solve(exact_gram + ridge.double(), (D.double() @ exact_gram).T).T
            inverse = invert(A)
            Y = inverse(B)
            error, estimate = relative_error(Y, exact), rounding_error(A, B, Y, inverse.diagnosis.norm)
            assert error < estimate < 50 * error + 1e-6
            assert inverse.diagnosis.error(A, B, Y) == estimate
            trusted.add(estimate <= SMALL_ERROR_TOLERANCE)
    assert trusted == {True, False}


def test_a_matrix_that_is_not_positive_definite_fails_in_float32_and_is_pseudo_inverted_in_float64() -> None:
    x = randn(4, 9)
    A, B = x.T @ x, randn(5, 4) @ x
    assert invert(A.float()).diagnosis.rank == 0  # to be formed again in float64
    inverse = invert(A)
    assert (inverse.diagnosis.regular, inverse.diagnosis.rank) == (False, 4)
    assert relative_error(inverse(B), B @ torch.linalg.pinv(A)) < 1e-10
    nothing = invert(torch.zeros(3, 3, dtype=torch.float64))
    assert nothing.diagnosis.rank == 0
    assert nothing(torch.ones(2, 3, dtype=torch.float64)).abs().max() == 0


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (600, 520)], ids=str)
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e12])
def test_leading_polar(shape: tuple[int, int], condition: float) -> None:
    """Directions of at most 2^-13 of the largest are null ones."""
    X = matrix_with_condition(*shape, condition, GENERATOR)
    for k in (1, min(shape) // 3, min(shape)):
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        found = leading_polar(X, k)
        kept = int((s[:k] > 2**-13 * s[0]).sum())
        assert (kept == k) == (condition < 1e4 or k == 1 or s[k - 1] > 2**-13)
        assert relative_error(found.singular_values[:kept], s[:kept]) < 1e-9
        assert not found.singular_values[kept:].any()
        assert relative_error(found.polar, U[:, :kept] @ Vh[:kept]) < 1e-9


def test_leading_polar_of_a_rank_deficient_matrix_keeps_the_rank() -> None:
    X = randn(20, 3) @ randn(3, 14)
    found = leading_polar(X, 6)
    U, _, Vh = torch.linalg.svd(X)
    assert relative_error(found.polar, U[:, :3] @ Vh[:3]) < 1e-10


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (540, 530)], ids=str)
@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
def test_leading_singular(shape: tuple[int, int], condition: float) -> None:
    X = matrix_with_condition(*shape, condition, GENERATOR)
    for k in (1, min(shape) // 3, min(shape)):
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        found = leading_singular(X, k)
        assert relative_error(found.s, s[:k]) < 1e-9
        assert relative_error(found.matrix(), (U[:, :k] * s[:k]) @ Vh[:k]) < 1e-9
        for vectors in (found.U, found.V):
            assert (
                relative_error(vectors.T @ vectors, torch.eye(k, dtype=torch.float64)) < 1e-13 * condition + 1e-9
            )  # rounding of X V over s_k


def test_leading_singular_leaves_out_null_directions() -> None:
    X = randn(20, 3) @ randn(3, 14)
    found = leading_singular(X, 6)
    assert found.rank == 3
    assert found.U.shape == (20, 3)
    assert found.s[3:].tolist() == [0.0, 0.0, 0.0]
    assert relative_error(found.matrix(), X) < 1e-12
    assert leading_singular(torch.zeros(4, 5), 2).rank == 0


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
def test_null_directions_are_a_share_of_the_largest(shape: tuple[int, int]) -> None:
    X = matrix_with_condition(*shape, 1e9, GENERATOR)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = int((s > NULL * s[0]).sum())
    found = leading_singular(X, 12, share=NULL)
    assert 0 < kept == found.rank < 12
    assert relative_error(found.polar(), U[:, :kept] @ Vh[:kept]) < 1e-7


def test_polar_of_vectors_that_share_a_direction() -> None:
    """Up to noise: [u u v] has the polar factor [u u sqrt(2) v] / sqrt(2)."""
    u, v = torch.eye(9, dtype=torch.float64)[:, :2].unbind(1)
    found = polar(torch.stack([u, u + 1e-6 * torch.eye(9, dtype=torch.float64)[2], v], 1))
    assert relative_error(found, torch.stack([u / 2**0.5, u / 2**0.5, v], 1)) < 1e-5


def test_polar() -> None:
    X = matrix_with_condition(30, 20, 1e3, GENERATOR)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    assert relative_error(polar(X), U @ Vh) < 1e-9
    assert relative_error(polar(X.float()).double(), U @ Vh) < 1e-3  # X's own rounding over its smallest value
    assert polar(X.float()).dtype == torch.float32


def test_inverse_root() -> None:
    x = randn(30, 12)
    root = inverse_root(x.T @ x)
    assert relative_error(root @ (x.T @ x) @ root, torch.eye(12, dtype=torch.float64)) < 1e-12
    flat = randn(3, 9)
    U, _, Vh = torch.linalg.svd(flat, full_matrices=False)
    assert relative_error(flat @ inverse_root(flat.T @ flat), U @ Vh) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_kth_largest_magnitude_is_the_sorted_one(dtype: torch.dtype) -> None:
    skewed = randn(1 << 21)
    skewed[::65] *= 1e3  # all that the sample sees
    coarse = (randn(300, 700) * 4).round()
    cases = (randn(37, 53), 1e-30 * randn(200), torch.zeros(5), torch.full((9,), -2.5), randn(1 << 21), skewed, coarse)
    for x in cases:
        x = x.to(dtype)
        ordered = x.flatten().abs().float().sort(descending=True).values
        for k in {1, 2, len(ordered) // 5 + 1, len(ordered)} & set(range(1, len(ordered) + 1)):
            assert kth_largest_magnitude(x, k) == ordered[k - 1].item()


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (4, 30), (9, 520)], ids=str)
@pytest.mark.parametrize("own_targets", [True, False])
@pytest.mark.parametrize("prior", [None, 0.7])
def test_least_squares(shape: tuple[int, int], own_targets: bool, prior: float | None) -> None:
    """The printed formula with every matrix formed; few short experts take the dual form."""
    Z, X = randn(3, *shape), randn(3, *shape)
    weights, ridge, relative = [1.0, 0.0, 2.0], 0.3, 0.2
    pulls = [0.5, 0.0, 3.0] if own_targets else None  # an expert of no weight pulls nowhere
    sources = lambda t, dtype, room=None: Z[t].to(dtype)  # noqa: E731
    targets = sources if own_targets else lambda t, dtype, room=None: X[t].to(dtype)
    problem = Problem(targets, sources, weights, shape, pulls, ridge, relative, prior)
    assert problem.prefers_dual == prefers_dual(3, *shape) == (3 * shape[0] < shape[1])
    fit = least_squares(problem, torch.float64, torch.device("cpu"))

    T = Z if own_targets else X
    G = [w * z.T @ z for w, z in zip(weights, Z, strict=True)]
    total = sum(G)
    A = total + (ridge + relative * total.trace() / shape[1]) * torch.eye(shape[1], dtype=torch.float64)
    moments = sum(t @ g for t, g in zip(T, G, strict=True))
    B = moments + sum(p * z for p, z in zip(pulls or [0.0] * 3, Z, strict=True))
    c = torch.zeros(shape[1]) if prior is None else prior * total.mean(0)
    assert relative_error(fit.M, B @ torch.linalg.inv(A + c)) < 1e-10
    assert fit.residual is None
    asked = replace(problem, residual_of=lambda: X[0])
    residual = least_squares(asked, torch.float64, torch.device("cpu")).residual
    assert residual is not None
    assert relative_error(residual, moments - X[0] @ A / 3) < 1e-10
