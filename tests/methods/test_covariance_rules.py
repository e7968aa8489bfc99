"""The rules that solve a least-squares problem per layer, apart from ace, against their oracles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import oracles
import pytest
import torch
from crossed import crossed, spread
from oracles import EXACT, average, relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.errors import UsageError
from acemerge.methods import make

SHAPES = [(24, 16), (16, 24), (20, 20), (3, 40), (40, 3)]
WEIGHTS = [2.0, 0.5, 1.5, 3.0]
RULES: dict[str, Callable[..., Tensor]] = {
    "ace_auto": oracles.ace_auto,
    "anchored": oracles.anchored,
    "kron": oracles.kron,
    "kron_auto": oracles.kron_auto,
    "actmat": oracles.actmat,
    "tact": partial(oracles.actmat, keep=0.5),
    "cauchy": oracles.cauchy,
    "swudi_a": oracles.swudi_a,
    "wudi": oracles.wudi,
}
TOLERANCE = {"wudi": 1e-6}
QUICK = {"wudi": {"steps": 50}}  # automatic differentiation is slow; one test and test_golden.py take all 300


def merged(deltas: Tensor, rule: str, **options: object) -> Tensor:
    return acemerge.merge_deltas(deltas, rule, **{**EXACT.get(rule, {}), **options}).delta


def error(deltas: Tensor, rule: str, **options: object) -> float:
    """What the rule makes of the task vectors against its oracle."""
    options = {**QUICK.get(rule, {}), **options}
    return relative_error(merged(deltas, rule, **options), RULES[rule](deltas, **options))


# --- against the formula -------------------------------------------------------------------------------------


@crossed(rule=RULES, T=[1, 2, 4], shape=SHAPES)
def test_float64_is_the_formula(rule: str, T: int, shape: tuple[int, int]) -> None:
    assert error(task_vectors(T, shape), rule) < TOLERANCE.get(rule, 1e-8)


@crossed(rule=RULES, T=[1, 2, 4], shape=SHAPES)
def test_float32_stays_close_to_the_formula(rule: str, T: int, shape: tuple[int, int]) -> None:
    assert error(task_vectors(T, shape).float(), rule) < 1e-4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)], ids=str)
def test_float32_stays_close_at_condition_1e6(rule: str, shape: tuple[int, int]) -> None:
    """Three experts: at 1e6 the second moment of one has a condition number of 1e12, too much for the oracle's pinv."""
    assert error(task_vectors(3, shape, condition=1e6).float(), rule) < 1e-4


@spread(rule=RULES, shape=[(48, 32), (32, 48), (40, 40)])
def test_one_expert_comes_back_at_condition_1e6(rule: str, shape: tuple[int, int]) -> None:
    """It minimises every one of these losses; tact with every entry kept."""
    deltas = task_vectors(1, shape, condition=1e6).float()
    params = {"keep": 1.0} if rule == "tact" else {}
    assert relative_error(merged(deltas, rule, **params), deltas[0]) < 1e-4


@pytest.mark.parametrize("rule", [rule for rule in RULES if "kron" not in rule])  # whose oracles' systems are dense
def test_a_large_layer_is_the_formula(rule: str) -> None:
    params = {"steps": 5} if rule == "wudi" else {}
    assert error(task_vectors(3, (540, 530)), rule, **params) < TOLERANCE.get(rule, 1e-8)


@crossed(rule=RULES, T=[1, 2, 4], shape=[(24, 16), (16, 24)])
def test_a_weight_multiplies_the_term_of_its_expert(rule: str, T: int, shape: tuple[int, int]) -> None:
    assert error(task_vectors(T, shape), rule, weights=WEIGHTS[:T]) < TOLERANCE.get(rule, 1e-8)


PARAMETERS = [
    ("anchored", {"lam": 0.2}),
    ("anchored", {"p": 0}),
    ("anchored", {"p": 2, "lam": 3.0}),
    ("kron", {"lam": 1.0}),
    ("kron_auto", {"lam": 3.0}),
    ("actmat", {"lam": 1e-2}),
    ("actmat", {"p": 1}),
    ("actmat", {"p": 2}),
    ("actmat", {"p": 1, "lam": 1e-2}),
    ("tact", {"keep": 0.2}),
    ("tact", {"p": 1}),
    ("tact", {"p": 2, "lam": 1e-2}),
    ("cauchy", {"tol": 1e-3}),
    ("cauchy", {"jitter": 0.1}),
    ("cauchy", {"side": "output"}),
    ("swudi_a", {"anchor": "mean"}),
    ("wudi", {"steps": 30}),
    ("wudi", {"lr": 1e-4, "steps": 50}),
]


@pytest.mark.parametrize(("rule", "params"), PARAMETERS, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_parameters_are_those_of_the_formula(rule: str, params: dict[str, object], shape: tuple[int, int]) -> None:
    deltas, weights = task_vectors(4, shape), WEIGHTS
    expected = RULES[rule](deltas, weights, **params)
    assert relative_error(expected, RULES[rule](deltas, weights)) > 1e-3
    found = merged(deltas, rule, weights=weights, **params)
    assert relative_error(found, expected) < TOLERANCE.get(rule, 1e-8)


def test_tact_that_keeps_everything_is_actmat() -> None:
    deltas = task_vectors(4, (24, 16))
    assert relative_error(merged(deltas, "tact", keep=1.0), oracles.actmat(deltas)) < 1e-8


def test_wudi_takes_300_steps() -> None:
    deltas = task_vectors(4, (24, 16))
    assert relative_error(merged(deltas, "wudi"), oracles.wudi(deltas, steps=300)) < 1e-6


def test_wudi_without_steps_is_the_sum() -> None:
    deltas = task_vectors(4, (24, 16))
    assert (
        relative_error(merged(deltas, "wudi", steps=0, weights=WEIGHTS), oracles.weighted(deltas, WEIGHTS).sum(0))
        < 1e-12
    )


@pytest.mark.parametrize("side", ["input", "output"])
def test_cauchy_ends_where_its_loss_is_least(side: str) -> None:
    """`sum_t w_t log(||(M - D_t) D_t^T||^2 + c_t)`: no gradient is left, which the first fit has."""
    deltas = task_vectors(3, (24, 16))
    found = acemerge.merge_deltas(deltas, "cauchy", weights=WEIGHTS[:3], jitter=0.0, side=side, stop=1e-12, steps=500)
    assert found.stats["status"] in ("ok", "pseudo-inverse")
    D = deltas if side == "input" else deltas.mT
    unit = ((D @ D.mT).square().sum((1, 2)) / D.square().sum((1, 2))).mean()

    def gradient(M: Tensor) -> Tensor:
        M = (M if side == "input" else M.T).clone().requires_grad_()
        terms = [((M - d) @ d.T).square().sum() + 0.3 * d.square().sum() * unit for d in D]
        sum(w * term.log() for w, term in zip(WEIGHTS, terms, strict=False)).backward()
        return M.grad

    first = gradient(merged(deltas, "cauchy", weights=WEIGHTS[:3], jitter=0.0, side=side, steps=0))
    assert gradient(found.delta).norm() < 1e-8 * first.norm()


def test_cauchy_is_around_one_fit_alone() -> None:
    for over in ("swudi_a", "tsv_m"):
        with pytest.raises(UsageError, match=f"{over} is no single fit by least squares"):
            make("cauchy", {"over": over})


# --- where the formulas end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_experts_without_an_update_drop_out(rule: str) -> None:
    deltas, params = task_vectors(3, (16, 24)), QUICK.get(rule, {})
    frozen = torch.cat([deltas, torch.zeros_like(deltas[:1])])
    found = merged(frozen, rule, **params)
    assert relative_error(found, RULES[rule](deltas, **params)) < TOLERANCE.get(rule, 1e-8)


@pytest.mark.parametrize("rule", ["actmat", "tact"])
def test_directions_in_which_no_expert_moved_stay_at_the_base(rule: str) -> None:
    deltas = task_vectors(3, (16, 24)).clone()
    deltas[:, :, 20:] = 0
    found = merged(deltas, rule)
    assert found[:, 20:].abs().max() < 1e-12
    assert relative_error(found, RULES[rule](deltas)) < 1e-8


@pytest.mark.parametrize("rule", ["actmat", "tact"])
@pytest.mark.parametrize(("sides", "averaged"), [((20_001, 2), True), ((2, 20_001), True), ((20_000, 2), False)])
def test_vocabularies_are_averaged(rule: str, sides: tuple[int, int], averaged: bool) -> None:
    deltas = torch.randn(2, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = average(deltas, WEIGHTS[:2]) if averaged else RULES[rule](deltas, WEIGHTS[:2])
    assert relative_error(merged(deltas, rule, weights=WEIGHTS[:2]), expected) < 1e-8
