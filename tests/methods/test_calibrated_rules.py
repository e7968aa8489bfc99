"""The rules that merge by what was measured on data, against their oracles, on measurements made here."""

from __future__ import annotations

import oracles
import pytest
import torch
from crossed import crossed
from oracles import EXACT, average, relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.errors import UsageError
from acemerge.methods import Layer, make
from acemerge.methods.status import Status

REGRESSIONS = ["regmean", "regmean_pp"]
SHAPES = [(24, 16), (16, 24), (3, 40), (40, 3)]
WEIGHTS = [2.0, 0.5, 1.5, 3.0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moments(T: int, columns: int, rows: int = 100) -> Tensor:
    """Of correlated inputs, (T, in, in)."""
    Z = draw(T, rows, columns, seed=1) @ draw(T, columns, columns, seed=2)
    return Z.mT @ Z / rows


def merged(deltas: Tensor, rule: str, moments: Tensor, **options: object) -> Tensor:
    return acemerge.merge_deltas(deltas, rule, moments=moments, **options).delta


@crossed(rule=REGRESSIONS, options=[{}, {"a": 0.3}, {"weights": WEIGHTS}], shape=SHAPES)
def test_regmean_is_the_formula(rule: str, options: dict[str, object], shape: tuple[int, int]) -> None:
    deltas, moments = task_vectors(4, shape), second_moments(4, shape[1])
    expected = oracles.regmean(deltas, moments, **options)
    assert relative_error(merged(deltas, rule, moments, **options), expected) < 1e-8
    assert relative_error(merged(deltas.float(), rule, moments.float(), **options), expected) < 1e-4


def two_moments(T: int, out: int, columns: int) -> Tensor:
    """Of correlated inputs, and of gradients at the outputs, one after the other."""
    return torch.cat([second_moments(T, columns).flatten(1), second_moments(T, out, rows=60).flatten(1)], 1)


@pytest.mark.parametrize("options", [{}, {"lam": 1.0}, {"weights": WEIGHTS}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kfac_is_the_formula(options: dict[str, object], shape: tuple[int, int]) -> None:
    deltas, moments = task_vectors(4, shape), two_moments(4, *shape)
    expected = oracles.kfac(deltas, moments, **options)
    assert relative_error(merged(deltas, "kfac", moments, **EXACT["kfac"], **options), expected) < 1e-8
    found = acemerge.merge_deltas(deltas.float(), "kfac", moments=moments.float(), **options)
    assert relative_error(found.delta, expected) < 1e-2  # the default tol
    assert found.stats["status"] == "ok"


def test_kfac_leaves_experts_on_inputs_or_outputs_apart_to_themselves() -> None:
    """No update, where nobody's data or loss is; all of each expert's, with next to no pull, where its own is."""
    deltas, moments = task_vectors(2, (6, 8)), two_moments(2, 6, 8).clone()
    S = moments[:, :64].view(2, 8, 8)
    S[0, 4:], S[0, :, 4:], S[1, :4], S[1, :, :4] = 0, 0, 0, 0
    found = merged(deltas, "kfac", moments, lam=1e-11, **EXACT["kfac"])
    expected = torch.cat([deltas[0, :, :4], deltas[1, :, 4:]], 1)
    assert relative_error(found, expected) < 1e-6


def test_kfac_asks_nothing_of_an_expert_whose_data_did_not_reach_the_layer() -> None:
    deltas, moments = task_vectors(3, (6, 8)), two_moments(3, 6, 8).clone()
    moments[2] = 0
    found = merged(deltas, "kfac", moments, **EXACT["kfac"])
    assert relative_error(found, oracles.kfac(deltas[:2], moments[:2])) < 1e-8
    moments[1] = 0
    assert relative_error(merged(deltas, "kfac", moments), deltas[0]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"p": 0.5}, {"weights": WEIGHTS}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_esm_is_the_formula(options: dict[str, object], shape: tuple[int, int]) -> None:
    deltas, moments = task_vectors(4, shape), second_moments(4, shape[1])
    expected = oracles.esm(deltas, moments, **options)
    assert relative_error(merged(deltas, "esm", moments, **options), expected) < 1e-8
    assert relative_error(merged(deltas.float(), "esm", moments.float(), **options), expected) < 1e-4


def test_esm_takes_the_directions_that_inputs_move_not_the_largest_of_the_update() -> None:
    """One output answers to inputs that are there, another, more strongly, to one that is not."""
    D = torch.zeros(2, 4, 6, dtype=torch.float64)
    D[0, 0, 0], D[0, 1, 1] = 1.0, 5.0
    D[1, 2, 2], D[1, 3, 3] = 1.0, 5.0
    moments = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    moments[0, 1, 1] = moments[1, 3, 3] = 1e-9
    found = merged(D, "esm", moments)
    assert found[0, 0] > 0.1
    assert found[2, 2] > 0.1
    assert found[[1, 3]].abs().max() == 0


def test_esm_without_inputs_is_tsv_m_and_says_so() -> None:
    deltas, weights = task_vectors(3, (6, 8)), torch.tensor(WEIGHTS[:3], dtype=torch.float64)
    found = make("esm", {"scale": 0.5}).merge(deltas, Layer(weights, (0, 1, 2)))
    assert found.stats.statuses == (Status.UNSEEN_SPECTRAL,)
    assert relative_error(found.delta, 0.5 * oracles.tsv_m(deltas, WEIGHTS[:3])) < 1e-8


@pytest.mark.parametrize("options", [{}, {"floor": 0.1}, {"weights": WEIGHTS}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fisher_is_the_formula(options: dict[str, object], shape: tuple[int, int]) -> None:
    deltas, moments = task_vectors(4, shape), draw(4, *shape, seed=3) ** 4
    expected = oracles.fisher(deltas, moments, **options)
    assert relative_error(merged(deltas, "fisher", moments, **options), expected) < 1e-12
    assert relative_error(merged(deltas.float(), "fisher", moments.float(), **options), expected) < 1e-5


def test_regmean_is_the_best_linear_layer_for_everybodys_data() -> None:
    """Each expert's answers on its own inputs, fitted by one layer: stacked least squares of all rows."""
    deltas, Z = task_vectors(3, (5, 8)), draw(3, 60, 8)
    best = torch.linalg.lstsq(Z.flatten(0, 1), (Z @ deltas.mT).flatten(0, 1)).solution.T
    assert relative_error(merged(deltas, "regmean", Z.mT @ Z / 60, a=1.0), best) < 1e-10


def test_experts_on_inputs_apart_all_keep_their_answers() -> None:
    deltas = task_vectors(2, (5, 8))
    Z = torch.zeros(2, 60, 8, dtype=torch.float64)
    Z[0, :, :4], Z[1, :, 4:] = draw(60, 4), draw(60, 4, seed=1)
    found = merged(deltas, "regmean", Z.mT @ Z / 60)
    assert relative_error(Z @ found.T, Z @ deltas.mT) < 1e-10


def test_directions_that_no_input_reaches_stay_at_the_base() -> None:
    deltas, moments = task_vectors(3, (5, 8)), second_moments(3, 8)
    moments[:, 6:], moments[:, :, 6:] = 0, 0
    found = acemerge.merge_deltas(deltas, "regmean", moments=moments)
    assert found.stats["status"] == "pseudo-inverse"
    assert found.delta[:, 6:].abs().max() == 0
    seen = oracles.regmean(deltas[:, :, :6], moments[:, :6, :6])
    assert relative_error(found.delta[:, :6], seen) < 1e-10


@pytest.mark.parametrize("rule", [*REGRESSIONS, "fisher", "kfac"])
def test_what_was_not_seen_is_averaged_and_said(rule: str) -> None:
    deltas, weights = task_vectors(3, (5, 8)), torch.tensor(WEIGHTS[:3], dtype=torch.float64)
    found = make(rule, {"scale": 0.5}).merge(deltas, Layer(weights, (0, 1, 2)))
    assert found.stats.statuses == (Status.UNSEEN,)
    assert relative_error(found.delta, 0.5 * average(deltas, WEIGHTS[:3])) < 1e-12


def test_fused_experts_that_no_input_was_sent_to_are_averaged() -> None:
    deltas = task_vectors(2, (5, 8))
    found = acemerge.merge_deltas(deltas, "regmean", moments=torch.zeros(2, 8, 8))
    assert found.stats.statuses == (Status.UNSEEN,)
    assert relative_error(found.delta, average(deltas)) < 1e-12


def test_measurements_that_are_missing_or_do_not_fit_are_refused() -> None:
    deltas = task_vectors(3, (5, 8))
    for rule, what in (("regmean", "second moments"), ("fisher", "squared gradients"), ("kfac", "second moments")):
        with pytest.raises(UsageError, match=f"{rule}: needs {what}.*; give them as `moments`"):
            acemerge.merge_deltas(deltas, rule)
        with pytest.raises(UsageError, match=r"moments: shape \[3, 5, 5\]; give"):
            acemerge.merge_deltas(deltas, rule, moments=torch.ones(3, 5, 5))
        with pytest.raises(UsageError, match="measured on data; give the products"):
            acemerge.merge_factors([(torch.ones(5, 1), torch.ones(1, 8))], rule)
        with pytest.raises(UsageError, match="merges by measurements, and updates are turned"):
            make("knots", {"over": rule})
    with pytest.raises(UsageError, match="average does not use them"):
        acemerge.merge_deltas(deltas, "average", moments=torch.ones(3, 8, 8))
    with pytest.raises(UsageError, match=r"regmean: needs data, .*; merge their folders with `calibration`"):
        acemerge.merge_state_dicts({}, [{}], "regmean")


def test_svc_calibrates_what_data_made() -> None:
    deltas, moments = task_vectors(3, (5, 8)), second_moments(3, 8)
    expected = oracles.svc(oracles.regmean(deltas, moments), deltas)
    assert relative_error(merged(deltas, "svc", moments, over="regmean"), expected) < 1e-8
