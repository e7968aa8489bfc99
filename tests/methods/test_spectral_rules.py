"""The rules that work on singular vectors against their oracles, which take a full SVD.

A truncation is undefined inside a cluster of equal singular values, and so are the directions that svc calibrates.
The inputs here have their singular values well apart; where a sum of ill-conditioned experts crowds them, that is
at the small end, below every truncation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import oracles
import pytest
import torch
from crossed import crossed
from oracles import relative_error, svd, task_vectors
from torch import Tensor

import acemerge
from acemerge.errors import UsageError

SHAPES = [(24, 16), (16, 24), (20, 20), (3, 40), (40, 3)]
WEIGHTS = [2.0, 0.5, 1.5, 3.0]


def calibrated(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """svc over the rule's oracle."""
    return lambda deltas, weights=None: oracles.svc(rule(deltas, weights), deltas, weights)


# A rule, its parameters, its oracle. task_arithmetic at scale 1, where it does not matter which scale svc calibrates.
RULES = {
    "cart": ("cart", {}, oracles.cart),
    "tsv_m": ("tsv_m", {}, oracles.tsv_m),
    "iso_c": ("iso_c", {}, oracles.iso_c),
    "iso_cts": ("iso_cts", {}, oracles.iso_cts),
    "dc_merge": ("dc_merge", {"top": 0.05}, partial(oracles.dc_merge, top=0.05)),
    "svc over average": ("svc", {"over": "average"}, calibrated(oracles.average)),
    "svc over task_arithmetic": (
        "svc",
        {"over": "task_arithmetic"},
        calibrated(lambda deltas, weights: oracles.task_arithmetic(deltas, weights, scale=1.0)),
    ),
    "svc over ace": ("svc", {"over": "ace"}, calibrated(oracles.ace)),
    "svc over tsv_m": ("svc", {"over": "tsv_m"}, calibrated(oracles.tsv_m)),
}
CASES = [pytest.param(*values, id=name) for name, values in RULES.items()]
EACH_RULE = {"rule,params,oracle": CASES}


def merged(deltas: Tensor, rule: str, **options: object) -> Tensor:
    return acemerge.merge_deltas(deltas, rule, **options).delta


def with_frozen(deltas: Tensor) -> Tensor:
    """One more expert, without an update."""
    return torch.cat([deltas, torch.zeros_like(deltas[:1])])


def low_rank(T: int, shape: tuple[int, int], rank: int) -> Tensor:
    U, s, Vh = svd(task_vectors(T, shape))
    return U[:, :, :rank] * s[:, None, :rank] @ Vh[:, :rank]


# --- against the formula -------------------------------------------------------------------------------------


@crossed(**EACH_RULE, T=[1, 2, 4], shape=SHAPES)
def test_float64_is_the_formula(rule: str, params: dict, oracle: Callable, T: int, shape: tuple[int, int]) -> None:
    deltas = task_vectors(T, shape)
    assert relative_error(merged(deltas, rule, **params), oracle(deltas)) < 1e-8


@crossed(**EACH_RULE, T=[1, 2, 4], shape=SHAPES)
def test_float32_stays_close(rule: str, params: dict, oracle: Callable, T: int, shape: tuple[int, int]) -> None:
    deltas = task_vectors(T, shape).float()
    found = merged(deltas, rule, **params)
    assert found.dtype == torch.float32
    assert relative_error(found, oracle(deltas)) < 1e-4


@crossed(**EACH_RULE, T=[1, 3], shape=[(48, 32), (32, 48), (40, 40)])
def test_float32_stays_close_at_condition_1e6(
    rule: str, params: dict, oracle: Callable, T: int, shape: tuple[int, int]
) -> None:
    deltas = task_vectors(T, shape, condition=1e6).float()
    assert relative_error(merged(deltas, rule, **params), oracle(deltas)) < 1e-4


@pytest.mark.parametrize("rule", ["cart", "tsv_m", "iso_c", "iso_cts", "svc over average"])
def test_a_large_layer_is_the_formula(rule: str) -> None:
    deltas, (name, params, oracle) = task_vectors(3, (540, 530)), RULES[rule]
    assert relative_error(merged(deltas, name, **params), oracle(deltas)) < 1e-8


@crossed(**EACH_RULE, T=[1, 2, 4])
def test_a_weight_multiplies_its_task_vector(rule: str, params: dict, oracle: Callable, T: int) -> None:
    """Inside `over` a weight does what it does there; svc's own comparison is with w_t D_t."""
    deltas, weights = task_vectors(T, (16, 24)), WEIGHTS[:T]
    assert relative_error(merged(deltas, rule, weights=weights, **params), oracle(deltas, weights)) < 1e-8


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("cart", {"lam": 0.7}),
        ("cart", {"k_frac": 0.3}),
        ("iso_cts", {"common": 0.4}),
        ("iso_cts", {"common": 0.0}),
        ("dc_merge", {"top": 0.3}),
        ("dc_merge", {"top": 0.3, "smooth": "mean"}),
        ("dc_merge", {"top": 0.3, "smooth": "linear"}),
    ],
)
def test_parameters_are_those_of_the_formula(rule: str, params: dict[str, float]) -> None:
    deltas, oracle = task_vectors(4, (16, 24)), RULES[rule][2]
    assert relative_error(oracle(deltas, **params), oracle(deltas)) > 1e-3
    assert relative_error(merged(deltas, rule, **params), oracle(deltas, **params)) < 1e-8


# --- where the formulas end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", ["tsv_m", "iso_c", "iso_cts", "dc_merge", "svc over task_arithmetic", "svc over tsv_m"]
)
def test_experts_without_an_update_drop_out(rule: str) -> None:
    deltas, (name, params, oracle) = task_vectors(3, (16, 24)), RULES[rule]
    assert relative_error(merged(with_frozen(deltas), name, **params), oracle(deltas)) < 1e-8


def test_a_frozen_expert_counts_in_the_mean_that_svc_calibrates_but_not_in_the_calibration() -> None:
    deltas = task_vectors(3, (16, 24))
    expected = oracles.svc(deltas.sum(0) / 4, deltas)
    assert relative_error(merged(with_frozen(deltas), "svc", over="average"), expected) < 1e-8


def test_cart_takes_one_direction_at_least_and_counts_every_expert() -> None:
    deltas = with_frozen(task_vectors(2, (6, 5)))
    assert acemerge.merge_deltas(deltas, "cart").stats["rank"] == 1  # int(0.08 * 5) is 0
    assert relative_error(merged(deltas, "cart"), oracles.cart(deltas)) < 1e-8


def test_tsv_m_takes_one_direction_of_each_expert_at_least() -> None:
    """Four experts in three rows: [U_1 .. U_4] is wide, and its polar factor has orthonormal rows."""
    deltas = task_vectors(4, (3, 40))
    U, s, Vh = svd(deltas)
    left = oracles.polar(torch.stack([u[:, 0] for u in U], 1))
    right = oracles.polar(torch.stack([vh[0] for vh in Vh], 1))
    assert relative_error(merged(deltas, "tsv_m"), left @ s[:, 0].diag() @ right.T) < 1e-8


def test_tsv_m_takes_no_singular_vectors_from_null_directions() -> None:
    """Two experts of rank 2 where the formula asks for 8 directions of each: only those with a vector count."""
    deltas = low_rank(2, (16, 24), rank=2)
    U, s, Vh = svd(deltas)
    left = oracles.polar(torch.cat([u[:, :2] for u in U], 1))
    right = oracles.polar(torch.cat([vh[:2].T for vh in Vh], 1))
    assert relative_error(merged(deltas, "tsv_m"), left @ s[:, :2].flatten().diag() @ right.T) < 1e-8


def test_iso_c_counts_null_directions_in_the_mean_and_leaves_them_zero() -> None:
    deltas = low_rank(2, (16, 24), rank=3)
    U, s, Vh = svd(deltas.sum(0))
    expected = s.sum() / 16 * U[:, :6] @ Vh[:6]
    assert relative_error(merged(deltas, "iso_c"), expected) < 1e-8


@pytest.mark.parametrize("T", [1, 2])
def test_iso_cts_counts_null_directions_in_the_mean_and_has_no_vectors_for_them(T: int) -> None:
    """Experts of rank 3: of the 12 common directions 3 T exist, and beyond them is nothing but rounding."""
    deltas = low_rank(T, (16, 24), rank=3)
    U, s, Vh = svd(deltas.sum(0))
    expected = s.sum() / 16 * U[:, : 3 * T] @ Vh[: 3 * T]
    assert relative_error(merged(deltas, "iso_cts"), expected) < 1e-8


def test_iso_cts_takes_no_more_own_directions_than_there_are() -> None:
    """Eight directions and three experts without common ones: round(8 / 3) = 3 of each would be nine, so two are."""
    deltas = task_vectors(3, (8, 12))
    U, s, Vh = svd(deltas.sum(0))
    U, s, V = U[:, :2], s[:2], Vh[:2].T  # r - q T
    parts = [svd(d - U @ (U.T @ d)) for d in deltas]
    left = oracles.polar(torch.cat([*(u[:, :2] for u, _, _ in parts), U], 1))
    right = oracles.polar(torch.cat([*(vh[:2].T for _, _, vh in parts), V], 1))
    sizes = torch.cat([*(own[:2] for _, own, _ in parts), s])
    assert relative_error(merged(deltas, "iso_cts", common=0.0), sizes.mean() * left @ right.T) < 1e-8


@pytest.mark.parametrize("rule", ["iso_c", "iso_cts", "core_space"])
def test_small_directions_of_a_sum_in_float32_keep_their_digits(rule: str) -> None:
    """Directions of 1e-5 are lifted to the mean: what the sum is rounded to before that is lifted with them."""
    deltas = task_vectors(4, (40, 40), condition=1e5).float()
    assert relative_error(merged(deltas, rule), merged(deltas.double(), rule)) < 1e-4


def test_experts_that_share_their_columns_share_a_polar_factor() -> None:
    """Twice the same directions, with other sizes: polar([U U]) is [U U] / sqrt(2), and M the mean of the experts."""
    U, s, Vh = svd(task_vectors(1, (16, 24))[0])
    deltas = torch.stack([U[:, :4] @ (size * s[:4]).diag() @ Vh[:4] for size in (1.0, 3.0)])
    assert relative_error(merged(deltas, "tsv_m"), deltas.mean(0)) < 1e-8


def test_iso_cts_of_one_expert_is_iso_c() -> None:
    deltas = task_vectors(1, (16, 24))
    assert relative_error(merged(deltas, "iso_cts"), oracles.iso_c(deltas)) < 1e-8


def test_dc_merge_takes_of_an_adapter_no_more_directions_than_its_rank() -> None:
    """Three experts of rank 2: cores of side 6, though the layer has room for 5 directions of each."""
    deltas = low_rank(3, (16, 24), rank=2)
    U, _, Vh = svd(deltas)
    left = oracles.polar(torch.cat([u[:, :2] for u in U], 1))
    right = oracles.polar(torch.cat([vh[:2].T for vh in Vh], 1))
    cores = left.T @ deltas @ right
    blocks = [oracles.elect(cores[:, i : i + 2, i : i + 2]) for i in (0, 2, 4)]
    found = acemerge.merge_deltas(deltas, "dc_merge", top=1.0)
    assert found.stats["rank"] == 6
    assert relative_error(found.delta, left @ torch.block_diag(*blocks) @ right.T) < 1e-8


def test_dc_merge_keeps_nothing_of_experts_that_are_opposite() -> None:
    D = task_vectors(1, (16, 24))
    assert merged(torch.cat([D, -D]), "dc_merge", top=1.0).abs().max() == 0


# --- svc -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.1, 1.0])
@pytest.mark.parametrize("over", ["average", "tsv_m"])
def test_svc_takes_the_least_share_given(over: str, a: float) -> None:
    deltas = task_vectors(3, (16, 24))
    M = {"average": oracles.average, "tsv_m": oracles.tsv_m}[over](deltas)
    assert relative_error(oracles.svc(M, deltas, a=a), oracles.svc(M, deltas)) > 1e-3
    assert relative_error(merged(deltas, "svc", over=over, a=a), oracles.svc(M, deltas, a=a)) < 1e-8


@pytest.mark.parametrize("zeros", ["exact", "rounded"])
def test_svc_over_the_average_of_experts_at_right_angles_is_their_sum(zeros: str) -> None:
    """In each direction one expert has all: its share is 1 / T. The others have nothing there: theirs is a."""
    blocks = task_vectors(3, (4, 4))
    own = torch.eye(3, dtype=torch.float64)
    deltas = torch.stack([torch.kron(torch.outer(e, e), block) for e, block in zip(own, blocks, strict=True)])
    if zeros == "rounded":
        rotation = oracles.polar(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        deltas = rotation @ deltas @ rotation
    assert relative_error(merged(deltas, "svc", over="average"), deltas.sum(0)) < 1e-8


@crossed(size=[8, 12], T=[1, 2], seed=range(5))
def test_svc_over_ace_of_a_square_layer_is_the_formula(size: int, T: int, seed: int) -> None:
    """Centred columns leave M without the output direction of ones: one singular value is zero but for rounding."""
    deltas = task_vectors(T, (size, size), seed=seed)
    M = oracles.ace(deltas)
    assert torch.linalg.svdvals(M)[-1] < 1e-13
    assert relative_error(merged(deltas, "svc", over="ace"), oracles.svc(M, deltas)) < 1e-8


def test_svc_passes_parameters_to_the_rule_it_calibrates() -> None:
    deltas = task_vectors(3, (16, 24))
    found = merged(deltas, "svc", over={"name": "cart", "lam": 0.5})
    assert relative_error(found, oracles.svc(oracles.cart(deltas, lam=0.5), deltas)) < 1e-8
    with pytest.raises(UsageError, match="no such rule"):
        merged(deltas, "svc", over="unheard_of")
