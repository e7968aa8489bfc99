"""Updates of low rank: merged from their factors as from the full task vectors, which `merge_deltas` is the oracle for.

The sums have condition numbers of up to 1e4 with the ridges chosen here, so that 1e-9 is a tight bound in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import oracles
import pytest
import torch
from crossed import crossed, named
from oracles import relative_error, svd
from torch import Tensor

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.linalg.lowrank import LowRank, both_sides, left_side

Factors = list[tuple[Tensor, Tensor]]

SIZES = [0.1, 0.3, 0.2, 0.5]
WEIGHTS = [1.0, 0.5, 2.0, 0.0]
SHAPES = {  # out, in, ranks
    "square": (40, 40, (3, 2, 4, 1)),
    "wide": (24, 60, (3, 3, 3, 3)),
    "tall": (60, 24, (2, 3, 1, 4)),
    "more ranks than rows": (12, 60, (5, 5, 5, 5)),
    "more ranks than columns": (60, 12, (5, 5, 5, 5)),
    "one expert": (20, 30, (4,)),
}
CORED: list[tuple[str, dict]] = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.4}),
    ("ace", {"eps": 1e-2, "tau": 1e9}),
    ("ace", {"eps": 1e-2, "tau": -1.0, "k_frac": 0.1}),
    ("ace", {"eps": 1e-2, "tau": -1.0, "ablation": "E2"}),
    ("ace_auto", {}),
    ("anchored", {}),
    ("anchored", {"lam": 0.3, "p": 2}),
    ("kron", oracles.EXACT["kron"]),
    ("kron_auto", oracles.EXACT["kron_auto"]),
    ("actmat", {}),
    ("actmat", {"lam": 1e-2, "p": 1}),
    ("cauchy", {"tol": 3.0, "stop": 1e-10}),
    ("cauchy", {"over": {"name": "ace", "eps": 1e-2}, "tol": 3.0, "stop": 1e-10}),
    ("swudi_a", {}),
    ("cart", {}),
    ("tsv_m", {}),
    ("iso_c", {}),
    ("iso_cts", {"common": 0.5}),
    ("dc_merge", {}),
    ("dc_merge", {"top": 0.1, "smooth": "mean"}),
    ("svc", {"over": "average"}),
    ("svc", {"over": {"name": "ace", "eps": 1e-2}}),
    ("svc", {"over": "knots"}),
    ("knots", {}),
    ("knots", {"over": {"name": "ace", "eps": 1e-2}}),
    ("core_space", {}),
    ("core_space", {"over": "ties"}),
    ("core_space", {"over": {"name": "ace", "eps": 1e-2}}),
]
EACH_CORED = {"rule,params": [pytest.param(rule, params, id=f"{rule} {params}") for rule, params in CORED]}
over_cored = crossed(**EACH_CORED)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(out: int, columns: int, ranks: Sequence[int], seed: int = 0) -> Factors:
    return [
        (size * randn(out, r, seed=seed + 2 * t), randn(r, columns, seed=seed + 2 * t + 1) / columns**0.5)
        for t, (r, size) in enumerate(zip(ranks, SIZES, strict=False))
    ]


def products(pairs: Factors) -> Tensor:
    return torch.stack([U @ V for U, V in pairs])


def check_equal(pairs: Factors, rule: str, tolerance: float = 1e-9, **options: object) -> acemerge.LowRankResult:
    """The result from the factors, once it is known to be that from the full task vectors."""
    found = acemerge.merge_factors(pairs, rule, **options)
    assert relative_error(found.delta(), acemerge.merge_deltas(products(pairs), rule, **options).delta) < tolerance
    return found


# --- the same result, without the full task vectors -----------------------------------------------------------


@crossed(**EACH_CORED, shape=named(SHAPES), weighted=[False, True])
def test_the_result_is_that_of_the_full_task_vectors(rule: str, params: dict, shape: tuple, weighted: bool) -> None:
    pairs = factors(*shape)
    weights = WEIGHTS[: len(pairs)] if weighted else None
    check_equal(pairs, rule, weights=weights, **params)


@over_cored
def test_the_full_task_vectors_are_not_formed(rule: str, params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(updates: LowRank, dtype: torch.dtype) -> Tensor:
        raise AssertionError("formed")

    monkeypatch.setattr(LowRank, "full", refuse)
    found = acemerge.merge_factors(factors(40, 50, (3, 2, 4, 1)), rule, **params)
    assert found.right is not None
    assert found.left.shape[1] == found.right.shape[0] <= 11  # all ranks together, and 1 (out,)
    assert found.stats["status"] == "ok"


@over_cored
def test_float32_stays_close(rule: str, params: dict) -> None:
    pairs = factors(48, 40, (3, 2, 4, 1))
    found = acemerge.merge_factors([(U.float(), V.float()) for U, V in pairs], rule, **params)
    rounded = [(U.float().double(), V.float().double()) for U, V in pairs]  # ties must rank the same numbers
    assert found.left.dtype == torch.float32
    assert relative_error(found.delta(), acemerge.merge_factors(rounded, rule, **params).delta()) < 1e-5


@pytest.mark.parametrize(
    ("out", "columns", "awkward"),
    [
        (30, 20, lambda pairs: [*pairs, (torch.zeros(30, 2).double(), randn(2, 20))]),  # an expert without update
        (30, 20, lambda pairs: [pairs[0]] * 3),  # equal experts
        (
            30,
            20,
            lambda pairs: [(0.1 * torch.ones(30, 1).double(), randn(1, 20, seed=9)), *pairs],
        ),  # equal rows: the mean itself
        (30, 20, lambda pairs: [(U, V - V.mean(1, keepdim=True)) for U, V in pairs]),  # columns that sum to zero
        (30, 20, lambda pairs: [(U, pairs[0][1][: U.shape[1]]) for U, _ in pairs]),  # rows in one another's space
        (30, 20, lambda pairs: [(0.3**t * U, V) for t, (U, V) in enumerate(pairs)]),  # sizes far apart
        (50, 1, lambda pairs: pairs),
        (1, 50, lambda pairs: pairs),
    ],
)
@over_cored
def test_awkward_factors(rule: str, params: dict, out: int, columns: int, awkward) -> None:  # type: ignore[no-untyped-def]
    pairs = awkward(factors(out, columns, (2, 2, 1)))
    found = acemerge.merge_factors(pairs, rule, **params)
    assert torch.isfinite(found.delta()).all()
    if not found.stats.get("shared_input_side"):
        check_equal(pairs, rule, **params)


@over_cored
def test_no_update_gives_no_update(rule: str, params: dict) -> None:
    found = acemerge.merge_factors([(0 * U, V) for U, V in factors(30, 20, (2, 2))], rule, **params)
    assert found.delta().abs().max() == 0
    assert found.truncated(1).stats["energy_lost"] == 0


@over_cored
@pytest.mark.parametrize("shared", ["columns", "rows", "both"])
def test_factors_in_another_order_or_off_by_rounding_change_nothing(rule: str, params: dict, shared: str) -> None:
    """Experts within one another's space, so that there is rounding where a direction might be."""
    U, V = randn(30, 3), randn(3, 20, seed=1)
    left, right = shared in ("columns", "both"), shared in ("rows", "both")
    pairs = [
        (U[:, : t + 1] if left else randn(30, t + 1, seed=t), V[: t + 1] if right else randn(t + 1, 20, seed=t))
        for t in range(3)
    ]
    expected = acemerge.merge_factors(pairs, rule, **params).delta()
    turned = acemerge.merge_factors([(L.flip(1), R.flip(0)) for L, R in pairs], rule, **params).delta()
    assert relative_error(turned, expected) < 1e-9
    noisy = [tuple(x * (1 + 1e-15 * randn(*x.shape, seed=7)) for x in pair) for pair in pairs]
    assert relative_error(acemerge.merge_factors(noisy, rule, **params).delta(), expected) < 1e-9


def test_ace_beyond_the_rank_refines_what_is_there() -> None:
    """Null directions count as zeros in the mean and add nothing; the full task vectors hold rounding there."""
    pairs, k = factors(40, 30, (3, 2, 4, 1)), 15
    options = {"eps": 1e-2, "tau": -1.0}
    D = products(pairs)
    pre = oracles.ace(D, ablation="E3", **options)
    C = D - D.mean(1, keepdim=True)
    S = C.mT @ C
    z = torch.stack([s.trace() for s in S])
    S = S / z[:, None, None]
    mean = (S.sum(0) + (1e-2 / z).sum() * torch.eye(30).double()) / len(D)
    U, s, Vh = svd((D @ (S - mean)).sum(0) + pre)
    assert s[9] > 1e-4 * s[0] > 1e-8 * s[0] > s[10]  # a rank of 10 < k
    expected = pre + s[:10].sum() / k * U[:, :10] @ Vh[:10]
    found = acemerge.merge_factors(pairs, "ace", k_frac=k / 30, **options)
    assert relative_error(found.delta(), expected) < 1e-9
    assert found.stats["refined"] == k


# --- rules that must see the full task vectors, and ranks that leave nothing to save -------------------------


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "tact", "model_stock", "slerp"])
def test_a_rule_without_such_a_form_forms_them_and_says_so(rule: str) -> None:
    pairs = factors(12, 10, (2, 3))
    found = acemerge.merge_factors(pairs, rule, seed=3)
    assert torch.equal(found.delta(), acemerge.merge_deltas(products(pairs), rule, seed=3).delta)
    assert found.right is None
    assert "full updates formed" in found.stats["status"]


@pytest.mark.parametrize("rule", ["ace", "tsv_m", "knots"])
def test_ranks_that_fill_the_layer_are_merged_in_full(rule: str) -> None:
    found = check_equal(factors(10, 10, (4, 4, 4)), rule)
    assert found.right is None
    assert found.stats["status"] == "full updates formed"


def test_a_vocabulary_is_averaged_by_actmat() -> None:
    pairs = factors(20_001, 4, (1, 1))
    found = acemerge.merge_factors(pairs, "actmat")
    assert relative_error(found.delta(), products(pairs).mean(0)) < 1e-12
    assert found.stats["status"].startswith("averaged")


# --- the cores ------------------------------------------------------------------------------------------------


def test_cores_stand_for_the_updates_and_hold_the_ones() -> None:
    pairs = factors(30, 20, (3, 2, 1))
    updates = LowRank(tuple(U for U, _ in pairs), tuple(V for _, V in pairs))
    for cores in (both_sides(updates), left_side(updates)):
        Q_U, Q_V = cores.Q_U, torch.eye(20).double() if cores.Q_V is None else cores.Q_V
        for Q in (Q_U, Q_V):
            assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 1e-14
        assert relative_error(Q_U @ cores.values @ Q_V.T, products(pairs)) < 1e-14
        assert cores.frame.shape == (30, 20)
        assert (Q_U @ cores.frame.rows - 1).abs().max() < 1e-13
        assert (Q_V.T.sum(1) - cores.frame.columns).abs().max() < 1e-13


@pytest.mark.parametrize("first", [0, 3])
def test_an_expert_without_an_update_has_cores_of_zeros(first: int) -> None:
    (U, V), ranks = factors(30, 20, (3,))[0], (first, 3 - first)
    updates = LowRank(tuple(U[:, :r] for r in ranks), tuple(V[:r] for r in ranks))
    for cores in (both_sides(updates), left_side(updates)):
        assert relative_error(cores.frame.rows, cores.Q_U.sum(0)) < 1e-13
        assert [bool(core.any()) for core in cores.values] == [r > 0 for r in ranks]


def test_dependent_factors_add_no_direction() -> None:
    U, V = randn(30, 3), randn(3, 20, seed=1)
    cores = both_sides(LowRank((U, 1e-9 * U, 0 * U), (V, randn(3, 3) @ V, randn(3, 20, seed=2))))
    assert cores.values.shape == (3, 4, 6)


# --- truncation -----------------------------------------------------------------------------------------------


@crossed(rule=["average", "ace", "ties"], shape=[(30, 20, (3, 2, 4)), (6, 50, (4, 4, 4))], rank=[1, 4, 40])
def test_truncation_is_the_svd_and_tells_the_energy_lost(rule: str, shape: tuple, rank: int) -> None:
    found = acemerge.merge_factors(factors(*shape), rule)
    U, s, Vh = svd(found.delta())
    short = found.truncated(rank)
    assert short.left.shape[1] == short.right.shape[0] <= rank
    assert relative_error(short.delta(), U[:, :rank] @ s[:rank].diag() @ Vh[:rank]) < 1e-10
    lost = s[rank:].square().sum() / s.square().sum()
    assert short.stats["energy_lost"] == pytest.approx(float(lost), abs=1e-14)
    assert (lost > 1e-3) == (rank < 5)  # the case is not an empty one
    assert relative_error(short.left.norm(dim=0), short.right.norm(dim=1)) < 1e-7
    assert short.stats["status"] == found.stats["status"]


def test_a_rank_is_positive() -> None:
    with pytest.raises(UsageError, match="0 is no rank"):
        acemerge.merge_factors(factors(5, 4, (1,)), "average").truncated(0)


# --- experts that share A -------------------------------------------------------------------------------------


def sharing(out: int = 30, columns: int = 20, seed: int = 50) -> Factors:
    """Trained B, one A, of which each expert has its own combinations."""
    A = randn(3, columns, seed=seed)
    return [(U, randn(3, 3, seed=seed + t) @ A) for t, (U, _) in enumerate(factors(out, columns, (3, 3, 3)))]


@pytest.mark.parametrize(("rule", "params"), [("ace", {"eps": 1e-2}), ("actmat", {"lam": 1e-2}), ("tact", {})])
def test_a_shared_input_side_is_recognised_and_the_output_side_used(rule: str, params: dict) -> None:
    pairs = sharing()
    found = acemerge.merge_factors(pairs, rule, **params)
    assert (found.stats["shared_input_side"], found.stats["side"]) == (True, "output")
    turned = acemerge.merge_deltas(products(pairs).mT.contiguous(), rule, **params).delta.T
    assert relative_error(found.delta(), turned) < 1e-9
    assert relative_error(found.delta(), acemerge.merge_deltas(products(pairs), rule, **params).delta) > 1e-2


@pytest.mark.parametrize(
    ("pairs", "shared", "side"),
    [
        pytest.param(factors(30, 20, (3, 3, 3)), False, "input", id="own A"),
        pytest.param(sharing()[:1], False, "input", id="one expert"),
        pytest.param([*sharing(), (0 * randn(30, 2), randn(2, 20))], True, "output", id="and one without update"),
        pytest.param([(U, (1 + 1e-9 * t) * V) for t, (U, V) in enumerate(sharing())], True, "output", id="scaled"),
        pytest.param([(U, V + 1e-3 * t) for t, (U, V) in enumerate(sharing())], False, "input", id="near"),
        pytest.param([sharing()[0], (sharing()[1][0][:, :2], sharing()[1][1][:2])], False, "input", id="a part of it"),
        pytest.param([(U, V) for U, V in sharing(30, 3)], False, "input", id="A of full rank"),
        pytest.param([sharing()[0]] * 2, True, "input", id="B shared, too"),
    ],
)  # fmt: skip
def test_what_counts_as_shared(pairs: Factors, shared: bool, side: str) -> None:
    stats = acemerge.merge_factors(pairs, "actmat").stats
    assert (stats["shared_input_side"], stats["side"]) == (shared, side)


def test_rules_that_estimate_no_inputs_are_not_turned() -> None:
    found = check_equal(sharing(), "tsv_m")
    assert "shared_input_side" not in found.stats


def test_an_expert_of_weight_zero_hides_nothing() -> None:
    pairs = [*sharing(), factors(30, 20, (3,), seed=9)[0]]
    assert acemerge.merge_factors(pairs, "ace", weights=[1, 1, 1, 0]).stats["side"] == "output"
    assert acemerge.merge_factors(pairs, "ace").stats["side"] == "input"


# --- the entry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are none"),
        ([(randn(4, 2),)], "has 1 parts; give a pair"),
        ([(randn(4, 2), randn(3, 5))], "have no product"),
        ([(randn(4), randn(1, 5))], "have no product"),
        ([(randn(4, 0), randn(0, 5))], "have no product"),
        ([(randn(4, 2), randn(2, 5)), (randn(3, 2), randn(2, 5))], "factors 2: .* another layer"),
        ([(randn(4, 2), randn(2, 5)), (randn(4, 2), randn(2, 6))], "another layer"),
        ([(torch.ones(4, 2).long(), torch.ones(2, 5).long())], "floating-point"),
    ],
)
def test_bad_factors_are_named(pairs: Factors, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        acemerge.merge_factors(pairs, "ace")


def test_other_bad_arguments_are_named() -> None:
    pairs = factors(5, 4, (1, 2))
    with pytest.raises(CheckpointError, match="factors 2: has values that are not finite"):
        acemerge.merge_factors([pairs[0], (pairs[1][0] / 0, pairs[1][1])], "ace")
    with pytest.raises(UsageError, match="3 weights for 2 experts"):
        acemerge.merge_factors(pairs, "ace", weights=[1, 2, 3])
    with pytest.raises(UsageError, match="weights: not all are numbers; give one number for each expert"):
        acemerge.merge_factors(pairs, "ace", weights=["1", "b"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="negative weight"):
        acemerge.merge_factors(pairs, "ace", weights=[1, -2])
    with pytest.raises(UsageError, match="too narrow"):
        acemerge.merge_factors(pairs, "ace", compute_dtype=torch.float16)
    with pytest.raises(UsageError, match="did you mean `scale`"):
        acemerge.merge_factors(pairs, "ace", scal=2)


@over_cored
def test_the_input_is_left_alone_and_the_result_repeats(rule: str, params: dict) -> None:
    pairs = [(U.bfloat16(), V.bfloat16()) for U, V in factors(20, 30, (2, 3))]
    before = [(U.clone(), V.clone()) for U, V in pairs]
    first, second = (acemerge.merge_factors(pairs, rule, **params) for _ in range(2))
    assert all(torch.equal(U, X) and torch.equal(V, Y) for (U, V), (X, Y) in zip(pairs, before, strict=True))
    assert first.left.dtype == torch.float32
    assert torch.equal(first.delta(), second.delta())
