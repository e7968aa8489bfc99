"""The rules that work entry by entry, and those on the sphere, against their oracles."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from crossed import crossed
from oracles import elect, relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.linalg.select import share_of

SHAPES = [(24, 16), (16, 24), (20, 20), (3, 40), (40, 3)]
WEIGHTS = [2.0, 0.5, 1.5, 3.0]
RULES: dict[str, Callable[..., Tensor]] = {
    "average": oracles.average,
    "task_arithmetic": oracles.task_arithmetic,
    "ties": oracles.ties,
    "breadcrumbs": oracles.breadcrumbs,
    "consensus": oracles.consensus,
    "emr": lambda *args: oracles.emr(*args)[0],
    "model_stock": oracles.model_stock,
    "slerp": oracles.slerp,
    "karcher": oracles.karcher,
}
TO_CONVERGENCE = {"karcher": {"steps": 300, "tol": 1e-15}}  # its defaults stop within 1e-5 of the mean


def merged(deltas: Tensor, rule: str, **options: object) -> Tensor:
    return acemerge.merge_deltas(deltas, rule, **TO_CONVERGENCE.get(rule, {}), **options).delta


def base_weight(shape: tuple[int, int]) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(rule: str, T: int, shape: tuple[int, int]) -> Tensor:
    """Always two for slerp: of one it needs a base."""
    return task_vectors(2 if rule == "slerp" else T, shape)


# --- against the formula -------------------------------------------------------------------------------------


@crossed(rule=RULES, T=[1, 2, 4], shape=SHAPES)
def test_float64_is_the_formula(rule: str, T: int, shape: tuple[int, int]) -> None:
    deltas = experts(rule, T, shape)
    assert relative_error(merged(deltas, rule), RULES[rule](deltas)) < 1e-8


@crossed(rule=RULES, T=[1, 2, 4], shape=SHAPES)
def test_float32_stays_close_to_the_formula(rule: str, T: int, shape: tuple[int, int]) -> None:
    deltas = experts(rule, T, shape).float()
    found = merged(deltas, rule)
    assert found.dtype == torch.float32
    assert relative_error(found, RULES[rule](deltas)) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_large_layer_is_the_formula(rule: str) -> None:
    deltas = task_vectors(2 if rule == "slerp" else 3, (540, 530))
    assert relative_error(merged(deltas, rule), RULES[rule](deltas)) < 1e-8


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_a_weight_multiplies_its_task_vector(rule: str, T: int) -> None:
    deltas = experts(rule, T, (16, 24))
    weights = WEIGHTS[: len(deltas)]
    assert relative_error(merged(deltas, rule, weights=weights), RULES[rule](deltas, weights)) < 1e-8


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("task_arithmetic", {"scale": 0.4}),
        ("ties", {"keep": 0.55}),
        ("ties", {"keep": 1.0}),
        ("breadcrumbs", {"density": 0.4, "gamma": 0.25}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.0}),
        ("consensus", {"lam": 0.2}),
        ("consensus", {"lam": 1.1}),
        ("slerp", {"t": 0.2}),
    ],
)
def test_parameters_are_those_of_the_formula(rule: str, params: dict[str, float]) -> None:
    deltas = task_vectors(2 if rule == "slerp" else 4, (16, 24))
    expected = RULES[rule](deltas, **params)
    assert relative_error(expected, RULES[rule](deltas)) > 1e-3
    assert relative_error(merged(deltas, rule, **params), expected) < 1e-8


# --- ties and breadcrumbs: what is trimmed, who is elected ----------------------------------------------------


def test_ties_trims_each_expert_to_its_own_share() -> None:
    """Experts a thousandfold apart: a share over both of them would leave nothing of the smaller one."""
    small, large = normal(10, 10), 1000 * normal(10, 10, seed=1)
    disjoint = torch.stack([torch.cat([small, torch.zeros(10, 10)]), torch.cat([torch.zeros(10, 10), large])])
    found = merged(disjoint, "ties", keep=0.2)
    assert (found[:10] != 0).sum() == (found[10:] != 0).sum() == 40


def test_ties_keeps_entries_equal_to_the_last_one_kept() -> None:
    """Equal in float32, in which they are ranked."""
    deltas = torch.tensor([[[4.0, -2.0, 2.0 - 1e-12, 1.0]]], dtype=torch.float64)
    assert merged(deltas, "ties", keep=0.5).tolist() == [[4.0, -2.0, 2.0 - 1e-12, 0.0]]


def test_ties_keeps_at_least_one_entry() -> None:
    deltas = torch.tensor([[[4.0, -2.0, 3.0, 1.0]]], dtype=torch.float64)
    assert merged(deltas, "ties", keep=0.01).tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_ties_gives_the_majority_sign_where_the_sum_is_zero() -> None:
    """The majority of the entries' signs, whatever their size: one large positive sum against two negative ones."""
    deltas = torch.tensor([[[1.0, 9.0, -1.0, -1.0]], [[-1.0, 1.0, -1.0, -2.0]]], dtype=torch.float64)
    assert merged(deltas, "ties", keep=1.0).tolist() == [[-1.0, 5.0, -1.0, -1.5]]


@pytest.mark.parametrize("T", [2, 4])
def test_ties_of_small_integers_which_often_cancel_is_the_formula(T: int) -> None:
    deltas = normal(T, 24, 16).round()
    assert (deltas.sum(0) == 0).sum() > 50
    assert relative_error(merged(deltas, "ties", keep=1.0), oracles.ties(deltas, keep=1.0)) < 1e-8


def test_ties_leaves_disagreeing_and_missing_entries_out_of_the_mean() -> None:
    deltas = torch.tensor([[[5.0, 3.0]], [[-1.0, 0.0]], [[2.0, 1.0]]], dtype=torch.float64)
    assert merged(deltas, "ties", keep=1.0).tolist() == [[3.5, 2.0]]


def test_breadcrumbs_drops_both_ends() -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    deltas = (order + 1).double().view(1, 10, 10)
    kept = merged(deltas, "breadcrumbs", density=0.6, gamma=0.1)
    assert sorted(kept[kept != 0].tolist()) == list(range(31, 91))


def test_breadcrumbs_keeps_entries_equal_to_the_outermost_one_kept() -> None:
    deltas = torch.tensor([[[3.0, -3.0, 2.0, 1.0]]], dtype=torch.float64)
    assert merged(deltas, "breadcrumbs", density=0.5, gamma=0.25).tolist() == [[3.0, -3.0, 2.0, 0.0]]


def test_consensus_of_one_expert_needs_one_vote() -> None:
    deltas = task_vectors(1, (5, 4))
    assert torch.equal(merged(deltas, "consensus"), deltas[0])


# --- emr: masks and scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emr_masks_and_scales_are_the_formula(T: int, shape: tuple[int, int]) -> None:
    deltas = task_vectors(T, shape)
    result = acemerge.merge_deltas(deltas, "emr")
    M, masks, lambdas = oracles.emr(deltas)
    assert torch.equal(result.masks, masks)
    own, masked = (torch.tensor(result.stats[name], dtype=torch.float64) for name in ("own_l1", "masked_l1"))
    found = own / masked
    assert found.tolist() == pytest.approx(lambdas.tolist(), rel=1e-8)
    rebuilt = found[:, None, None] * result.masks * result.delta
    assert relative_error(rebuilt, lambdas[:, None, None] * masks * M) < 1e-8
    assert rebuilt.abs().sum((1, 2)).tolist() == pytest.approx(deltas.abs().sum((1, 2)).tolist())


def test_emr_gives_the_expert_back_not_its_weighted_update() -> None:
    """In its entries nobody else moved, so that lambda mask M is D_t to the bit, whatever its weight."""
    deltas, weights = torch.zeros(3, 6, 5, dtype=torch.float64), [0.5, -2.0, 0.0]
    deltas[0, :3], deltas[1, 3:] = normal(3, 5), normal(3, 5, seed=1)
    found = acemerge.merge_deltas(deltas, "emr", weights=weights)
    for t, (own, kept) in enumerate(zip(found.stats["own_l1"], found.stats["masked_l1"], strict=True)):
        rebuilt = (own / kept if kept else 0.0) * found.masks[t] * found.delta
        assert relative_error(rebuilt, deltas[t]) < 1e-14


def test_a_share_that_falls_short_of_a_whole_number_by_rounding_counts_as_it() -> None:
    assert 0.29 * 100 < 29
    assert [share_of(keep, n) for keep, n in ((0.29, 100), (0.57, 100), (0.5, 5), (0.01, 5), (1.0, 7))] == [
        29,
        57,
        2,
        1,
        7,
    ]


def test_emr_gives_an_expert_back_where_no_other_moved() -> None:
    deltas = torch.zeros(2, 6, 5, dtype=torch.float64)
    deltas[0, :3], deltas[1, 3:] = normal(3, 5), normal(3, 5, seed=1)
    result = acemerge.merge_deltas(deltas, "emr")
    assert torch.equal(result.masks * result.delta, deltas)
    assert result.stats["own_l1"] == pytest.approx(result.stats["masked_l1"])


# --- on the sphere and between weights ------------------------------------------------------------------------


ON_THE_SPHERE = [
    pytest.param(*case, id=str(case)) for case in (("slerp", 1), ("slerp", 2), *(("karcher", T) for T in (1, 2, 4)))
]


@crossed(**{"rule,T": ON_THE_SPHERE}, shape=SHAPES, dtype=[torch.float64, torch.float32])
def test_with_a_base_the_weights_are_merged(shape: tuple[int, int], rule: str, T: int, dtype: torch.dtype) -> None:
    deltas, base = task_vectors(T, shape).to(dtype), base_weight(shape).to(dtype)
    found = merged(deltas, rule, base=base, weights=WEIGHTS[:T])
    expected = RULES[rule](deltas, WEIGHTS[:T], base)
    assert relative_error(found, expected) < (1e-8 if dtype == torch.float64 else 1e-4)


def test_slerp_of_one_expert_starts_at_the_base() -> None:
    deltas, base = task_vectors(1, (8, 6)), base_weight((8, 6))
    found = [merged(deltas, "slerp", base=base, t=t) for t in (0.0, 0.4, 1.0)]
    assert found[0].abs().max() < 1e-15
    assert relative_error(found[1], oracles.slerp(deltas, base=base, t=0.4)) < 1e-12
    assert relative_error(found[2], deltas[0]) < 1e-12


def test_slerp_from_a_base_of_zero_is_straight() -> None:
    """Zero has no direction, so there is no angle."""
    deltas = task_vectors(1, (8, 6))
    assert relative_error(merged(deltas, "slerp", t=0.3), 0.3 * deltas[0]) < 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_is_straight_between_nearly_parallel_weights(sign: float) -> None:
    first = normal(8, 6)
    second = sign * (first + 0.02 * normal(8, 6, seed=1))
    cosine = (first * second).sum() / (first.norm() * second.norm())
    assert 0.9995 < abs(cosine) < 0.9999
    found = merged(torch.stack([first, second]), "slerp", t=0.3)
    assert relative_error(found, 0.7 * first + 0.3 * second) < 1e-12


def test_slerp_follows_the_arc_just_outside_the_straight_range() -> None:
    first = normal(8, 6)
    deltas = torch.stack([first, first + 0.06 * normal(8, 6, seed=1)])
    straight = deltas.mean(0)
    assert relative_error(oracles.slerp(deltas), straight) > 1e-5
    assert relative_error(merged(deltas, "slerp"), oracles.slerp(deltas)) < 1e-12


def test_model_stock_drops_frozen_experts_and_keeps_one_whole() -> None:
    deltas = task_vectors(3, (8, 6))
    frozen = torch.cat([deltas, torch.zeros_like(deltas[:1])])
    assert relative_error(merged(frozen, "model_stock"), oracles.model_stock(deltas)) < 1e-12
    assert relative_error(merged(frozen[2:], "model_stock"), deltas[2]) < 1e-12


def test_model_stock_of_experts_that_cancel_is_nothing() -> None:
    delta = normal(8, 6)
    assert merged(torch.stack([delta, -delta]), "model_stock").abs().max() == 0


def test_karcher_drops_zero_tensors() -> None:
    deltas = task_vectors(3, (8, 6))
    frozen = torch.cat([deltas, torch.zeros_like(deltas[:1])])
    assert relative_error(merged(frozen, "karcher"), oracles.karcher(deltas)) < 1e-8


def test_karcher_with_its_defaults_is_within_its_tolerance() -> None:
    deltas = task_vectors(4, (24, 16))
    found = acemerge.merge_deltas(deltas, "karcher").delta
    assert relative_error(found, oracles.karcher(deltas)) < 3e-5


# --- dare and della: chance ----------------------------------------------------------------------------------


def total(deltas: Tensor) -> Tensor:
    return deltas.sum(0)


def alone(deltas: Tensor, rule: str, **options: object) -> Tensor:
    """(T, out, in): what the rule leaves of each expert, told by weights of zero for the others."""
    ones = torch.eye(len(deltas)).tolist()
    return torch.stack([merged(deltas, rule, weights=weights, **options) for weights in ones])


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_keeps_a_share_of_the_entries_and_divides_them_by_it(rule: str, p: float) -> None:
    deltas = normal(2, 200, 150)
    left = alone(deltas, rule, p=p)
    kept = left != 0
    assert relative_error(left, kept * deltas / (1 - p)) < 1e-12
    sd = (p * (1 - p) / deltas[0].numel()) ** 0.5
    assert kept.double().mean((1, 2)).tolist() == pytest.approx([1 - p, 1 - p], abs=4 * sd)
    together = (1 - p) ** 2  # the experts' masks are independent of each other
    sd = (together * (1 - together) / deltas[0].numel()) ** 0.5
    assert float(kept.all(0).double().mean()) == pytest.approx(together, abs=4 * sd)


@crossed(rule=["dare_linear", "dare_ties", "della"], T=[1, 2, 4], shape=SHAPES)
def test_what_chance_leaves_is_combined_by_the_formula(rule: str, T: int, shape: tuple[int, int]) -> None:
    deltas, combine = task_vectors(T, shape), total if rule == "dare_linear" else elect
    expected = combine(alone(deltas, rule, seed=3))
    assert relative_error(merged(deltas, rule, seed=3), expected) < 1e-8
    assert relative_error(merged(deltas.float(), rule, seed=3), expected) < 1e-4
    scaled = [w * left for w, left in zip(WEIGHTS, alone(deltas, rule, seed=3), strict=False)]
    assert relative_error(merged(deltas, rule, seed=3, weights=WEIGHTS[:T]), combine(torch.stack(scaled))) < 1e-8


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties", "della"])
def test_chance_comes_from_the_seed_alone(rule: str) -> None:
    deltas = task_vectors(2, (24, 16))
    first = merged(deltas, rule, seed=1)
    torch.manual_seed(0)
    assert torch.equal(merged(deltas, rule, seed=1), first)
    assert not torch.equal(merged(deltas, rule, seed=2), first)


def test_the_expectation_of_dare_is_the_sum() -> None:
    deltas, draws = task_vectors(2, (24, 16)), 400
    mean = sum(merged(deltas, "dare_linear", seed=seed) for seed in range(draws)) / draws
    sd = deltas.norm() / draws**0.5  # of the whole difference, at p = 1/2
    assert 0.8 * sd < (mean - deltas.sum(0)).norm() < 1.2 * sd


def test_dare_without_dropping_is_the_sum() -> None:
    deltas = task_vectors(3, (24, 16))
    assert relative_error(merged(deltas, "dare_linear", p=0.0), deltas.sum(0)) < 1e-12


@pytest.mark.parametrize(("density", "eps"), [(0.5, 0.1), (0.5, 0.8), (0.3, 0.4)])
def test_della_keeps_large_entries_more_often_and_divides_by_the_probability(density: float, eps: float) -> None:
    rows, n = 2000, 11
    order = torch.rand(rows, n, generator=torch.Generator().manual_seed(0)).argsort(1)  # 0 for the smallest
    deltas = (order + 1.0).double() * normal(rows, 1).sign()
    q = density + eps * (torch.arange(n, dtype=torch.float64) / (n - 1) - 0.5)
    left = merged(deltas[None], "della", density=density, eps=eps)
    kept = left != 0
    assert relative_error(left, kept * deltas / q[order]) < 1e-12
    share = torch.stack([kept[order == rank].double().mean() for rank in range(n)])
    assert ((share - q).abs() < 4 * (q * (1 - q) / rows).sqrt()).all()


def test_della_of_single_entries_keeps_them_with_the_density() -> None:
    deltas = normal(1, 2000, 1)
    left = merged(deltas, "della", density=0.3, eps=0.4)
    kept = left != 0
    assert relative_error(left, kept * deltas[0] / 0.3) < 1e-12
    assert float(kept.double().mean()) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)
