"""The metrics against their definitions, and the bootstrap against what is known of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from acemerge.evaluation.metrics import METRICS, bootstrap, interval
from acemerge.evaluation.tables import Evaluation, MeanScore, Row, Score, mean, normalised


def accuracy_oracle(labels: Sequence[int], found: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(labels, found, strict=True)) / len(labels)


def f1_oracle(labels: Sequence[int], found: Sequence[int]) -> float:
    pairs = list(zip(labels, found, strict=True))
    precision = pairs.count((1, 1)) / (pairs.count((1, 1)) + pairs.count((0, 1)))
    recall = pairs.count((1, 1)) / (pairs.count((1, 1)) + pairs.count((1, 0)))
    return 2 * precision * recall / (precision + recall)


def pearson_oracle(labels: Sequence[float], found: Sequence[float]) -> float:
    a, b = sum(labels) / len(labels), sum(found) / len(found)
    products = sum((x - a) * (y - b) for x, y in zip(labels, found, strict=True))
    return products / math.sqrt(sum((x - a) ** 2 for x in labels) * sum((y - b) ** 2 for y in found))


def spearman_oracle(labels: Sequence[float], found: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]

    return pearson_oracle(ranks(labels), ranks(found))


def matthews_oracle(labels: Sequence[int], found: Sequence[int]) -> float:
    """The correlation of the classes' indicators, summed over the classes."""
    classes = range(max(*labels, *found) + 1)

    def covariance(x: Sequence[int], y: Sequence[int]) -> float:
        total = 0.0
        for c in classes:
            a, b = sum(v == c for v in x) / len(x), sum(v == c for v in y) / len(y)
            total += sum(((v == c) - a) * ((w == c) - b) for v, w in zip(x, y, strict=True))
        return total

    return covariance(labels, found) / math.sqrt(covariance(labels, labels) * covariance(found, found))


ORACLES = {
    "accuracy": (accuracy_oracle, 4),
    "matthews": (matthews_oracle, 4),
    "f1": (f1_oracle, 2),
    "pearson": (pearson_oracle, None),
    "spearman": (spearman_oracle, None),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_its_definition(name: str) -> None:
    oracle, classes = ORACLES[name]
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 50) if classes else random.integers(0, 10, 50) / 2  # with ties
    found = np.where(random.random(50) < 0.6, labels, random.permutation(labels))
    assert METRICS[name](labels, found) == pytest.approx(oracle(labels.tolist(), found.tolist()), abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_that_of_scikit_learn_and_scipy(name: str) -> None:
    random = np.random.default_rng(1)
    theirs = {
        "accuracy": metrics.accuracy_score,
        "matthews": metrics.matthews_corrcoef,
        "f1": metrics.f1_score,
        "pearson": lambda x, y: stats.pearsonr(x, y).statistic,
        "spearman": lambda x, y: stats.spearmanr(x, y).statistic,
    }
    for count in (2, 3, 40):
        labels, found = random.permuted(np.tile([0, 1], (2, 20)), axis=1)[:, :count]
        labels[:2], found[:2] = [0, 1], [1, 1] if count > 2 else [0, 1]
        if name in ("pearson", "spearman"):
            labels, found = labels + 0.0, found + random.random(count)
        assert METRICS[name](labels, found) == pytest.approx(theirs[name](labels, found), abs=1e-12)


@pytest.mark.parametrize("name", ["matthews", "f1", "pearson", "spearman"])
def test_a_constant_answer_scores_nothing(name: str) -> None:
    assert METRICS[name](np.array([0, 1, 1, 0]), np.zeros(4, dtype=np.int64)) == 0


def test_the_bootstrap_of_an_accuracy_is_binomial() -> None:
    right = np.arange(200) < 150
    low, high = interval(bootstrap(lambda rows: float(right[rows].mean()), 200, 20_000, [0]))
    exact = stats.binom(200, 0.75).ppf([0.025, 0.975]) / 200
    assert np.abs(np.array([low, high]) - exact).max() <= 1 / 200  # one example: the quantiles are of whole examples


def test_the_bootstrap_draws_the_same_rows_for_one_seed() -> None:
    values = np.random.default_rng(1).random(30)

    def draws(seed: list[int]) -> list[float]:
        return bootstrap(lambda rows: float(values[rows].mean()), 30, 100, seed).tolist()

    assert draws([0, 1]) == draws([0, 1]) != draws([0, 2])


def _score(task: str, value: float, draws: list[float], is_perplexity: bool = False) -> Score:
    return Score(task, value, {}, np.array(draws), {}, is_perplexity)


def test_averages_over_tasks() -> None:
    experts = Row("experts", (_score("a", 0.8, [0.8]), _score("b", 0.5, [0.5]), _score("p", 10.0, [10.0], True)))
    scores = (_score("a", 0.4, [0.2, 0.6]), _score("b", 0.5, [0.4, 0.6]), _score("p", 20.0, [16.0, 25.0], True))
    merged = Row("merged", scores)
    found = mean(merged)
    assert found is not None
    assert (found.value, found.tasks) == (pytest.approx(0.45), 2)  # a perplexity is no part of it
    assert found.interval == pytest.approx(tuple(np.percentile([0.3, 0.6], [2.5, 97.5])))
    found = normalised(merged, experts)
    assert found is not None
    assert found.value == pytest.approx((0.5 + 1.0 + 0.5) / 3)  # of a perplexity the inverse
    one, two = (0.25 + 0.8 + 10 / 16) / 3, (0.75 + 1.2 + 10 / 25) / 3
    assert found.interval == pytest.approx(tuple(np.percentile([one, two], [2.5, 97.5])))
    assert normalised(merged, None) is None
    assert normalised(experts, experts) == MeanScore(1.0, (1.0, 1.0), 3)
    useless = Row("experts", (_score("a", 0.0, [0.0]), *experts.scores[1:]))
    left = normalised(merged, useless)
    assert left is not None
    assert left.tasks == 2
    assert mean(Row("partial", (scores[0], None, None))) is None


def test_the_markdown_table() -> None:
    row = Row("a|b", (_score("x", 0.5, [0.25, 0.75]), _score("p", 7.0, [7.0, 7.0], True)))
    lines = Evaluation(("x", "p"), (row,)).markdown().splitlines()
    assert lines[0] == "|  | x | p (perplexity) | mean | of experts |"
    assert lines[2] == "| a\\|b | 50.0 [26.2, 73.8] | 7.00 [7.00, 7.00] | 50.0 [26.2, 73.8] | - |"


def test_the_best_of_each_column_is_marked_the_experts_aside() -> None:
    def row(name: str, score: float, perplexity: float) -> Row:
        return Row(name, (_score("x", score, [score]), _score("p", perplexity, [perplexity], True)))

    table = Evaluation(("x", "p"), (row("experts", 0.9, 5), row("a", 0.5, 8), row("b", 0.4, 7), row("c", 0.5, 9)))
    header, rows = table.marked()
    best = {name: {row[0] for row in rows if row[i].endswith(" *")} for i, name in enumerate(header) if i}
    assert best == {"x": {"a", "c"}, "p (perplexity)": {"b"}, "mean": {"a", "c"}, "of experts": {"a"}}
    assert [cells[0] for cells in table.cells()[1]] == ["experts", "a", "b", "c"]
    assert not any("*" in cell for row in table.cells()[1] for cell in row)
