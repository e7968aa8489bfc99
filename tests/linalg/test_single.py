"""Leading singular vectors in float32 against a float64 SVD: what is returned is accurate, or None is."""

from __future__ import annotations

import pytest
import torch
from oracles import matrix_with_condition, relative_error
from torch import Tensor

import acemerge
from acemerge.linalg.single import leading_in_float32
from acemerge.linalg.spectral import leading_polar, leading_singular

GENERATOR = torch.Generator().manual_seed(0)


def spectrum(kind: str, m: int, n: int) -> Tensor:
    """A float32 matrix (m, n) whose singular values are of noise, graded, or of a task in noise."""
    if kind == "noise":
        return torch.randn(m, n, generator=GENERATOR)
    if kind == "task in noise":
        task = torch.randn(m, n // 8, generator=GENERATOR) @ torch.randn(n // 8, n, generator=GENERATOR)
        return task / (n // 8) ** 0.5 + 0.3 * torch.randn(m, n, generator=GENERATOR)
    return matrix_with_condition(m, n, 1e6 if kind == "condition 1e6" else 1e2, GENERATOR).float()


@pytest.mark.parametrize("kind", ["noise", "task in noise", "condition 1e2", "condition 1e6"])
@pytest.mark.parametrize("shape", [(512, 512), (900, 520)], ids=str)
@pytest.mark.parametrize("share", [0.08, 0.3, 0.5])
def test_what_is_returned_is_within_the_tolerance(kind: str, shape: tuple[int, int], share: float) -> None:
    X = spectrum(kind, *shape)
    k = int(share * shape[1])
    exact_U, exact_s, exact_Vh = torch.linalg.svd(X.double(), full_matrices=False)
    polar, low_rank = exact_U[:, :k] @ exact_Vh[:k], exact_U[:, :k] * exact_s[:k] @ exact_Vh[:k]
    found = leading_in_float32(X, k, 0.0)
    assert found is not None or kind == "condition 1e6"
    if found is not None:
        U, s, V = (part.double() for part in found)
        assert relative_error(U @ V.T, polar) < 1e-4
        assert relative_error(U * s @ V.T, low_rank) < 1e-4
        assert relative_error(s, exact_s[:k]) < 1e-6
        assert relative_error(V.T @ V, torch.eye(k, dtype=torch.float64)) < 1e-5
    for tall in (X, X.T):
        assert relative_error(leading_polar(tall, k).polar.double(), polar if tall is X else polar.T) < 1e-4
        assert relative_error(leading_singular(tall, k).matrix().double(), low_rank if tall is X else low_rank.T) < 1e-4


def test_neighbours_that_rounding_mixes_are_told_apart_or_left_to_float64() -> None:
    """The k-th and the next singular value closer and closer to each other."""
    U, V = (torch.linalg.qr(torch.randn(600, 600, generator=GENERATOR, dtype=torch.float64))[0] for _ in range(2))
    k, returned = 100, []
    for gap in (1e-2, 1e-4, 1e-6, 1e-8):
        s = torch.linspace(2.0, 1.0, 600, dtype=torch.float64)
        s[k] = s[k - 1] * (1 - gap)
        s[k + 1 :].clamp_(max=float(s[k]) - 1e-3)
        found = leading_in_float32((U * s @ V.T).float(), k, 0.0)
        returned.append(found is not None)
        if found is not None:
            assert relative_error((found[0] @ found[2].T).double(), U[:, :k] @ V[:, :k].T) < 2e-4
    assert returned[0]
    assert not returned[-1]


def test_where_float32_will_not_do_there_is_none() -> None:
    X = torch.randn(600, 550, generator=GENERATOR)
    low = torch.randn(600, 40, generator=GENERATOR) @ torch.randn(40, 550, generator=GENERATOR)
    for matrix, k, floor in [
        (X.double(), 50, 0.0),  # it is to be as accurate as its type
        (X[:, :500], 50, 0.0),  # small
        (X, 300, 0.0),  # more than half
        (X, 0, 0.0),
        (1e-20 * X, 50, 0.0),  # squares below the smallest number
        (1e20 * X, 50, 0.0),
        (X, 50, 1e3),  # nothing above the floor
        (low, 60, 0.0),  # the directions beyond the rank are anything
        (torch.zeros(600, 550), 50, 0.0),
    ]:
        assert leading_in_float32(matrix, k, floor) is None


@pytest.mark.parametrize(("rule", "params"), [("ace", {"tau": -1.0}), ("tsv_m", {}), ("cart", {})], ids=str)
def test_a_rule_says_how_many_spectra_took_float64(rule: str, params: dict[str, float]) -> None:
    """None of noise; all of rank-deficient updates of which more directions are asked for than there are."""
    noise = torch.randn(3, 560, 540, generator=GENERATOR)
    flat = torch.randn(3, 560, 5, generator=GENERATOR) @ torch.randn(3, 5, 540, generator=GENERATOR)
    for deltas, expected in ((noise, 0), (flat, 1 if rule == "ace" else 3)):
        single = acemerge.merge_deltas(deltas, rule, **params)
        double = acemerge.merge_deltas(deltas, rule, compute_dtype=torch.float64, **params)
        assert single.stats["float64_spectra"] == expected
        assert double.stats["float64_spectra"] == (1 if rule == "ace" else 3)
        if expected == 0:
            assert relative_error(single.delta.double(), double.delta) < 1e-4
