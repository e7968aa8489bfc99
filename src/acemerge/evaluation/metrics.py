"""GLUE's metrics, and how far chance moves them: pure functions of numbers.

Own formulas, each of a few vector operations: a bootstrap takes them thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Draws = npt.NDArray[np.float64]
Metric = Callable[[Array, Array], float]


def accuracy(labels: Array, predictions: Array) -> float:
    """The share of examples whose class was found."""
    return float(np.mean(labels == predictions))


def matthews(labels: Array, predictions: Array) -> float:
    """Matthews' correlation, for any number of classes (Gorodkin 2004, eq. 8); 0 where one side is constant.

    With `t_k` examples of class k, `p_k` answers k, `c` of `s` right:
    `(c s - sum t_k p_k) / sqrt((s^2 - sum t_k^2) (s^2 - sum p_k^2))`.
    """
    count = int(max(labels.max(), predictions.max())) + 1
    t, p = (np.bincount(side, minlength=count).astype(np.float64) for side in (labels, predictions))
    c, s = np.sum(labels == predictions), len(labels)
    spread = (s * s - t @ t) * (s * s - p @ p)
    return float((c * s - t @ p) / np.sqrt(spread)) if spread > 0 else 0.0


def f1(labels: Array, predictions: Array) -> float:
    """`2 TP / (2 TP + FP + FN)` of class 1 of two; 0 where neither side has it."""
    hits = np.sum((labels == 1) & (predictions == 1))
    named = np.sum(labels == 1) + np.sum(predictions == 1)
    return float(2 * hits / named) if named else 0.0


def pearson(labels: Array, predictions: Array) -> float:
    """The linear correlation, in float64; 0 where one side is constant."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    x, y = (np.asarray(side, dtype=np.float64) - np.mean(side, dtype=np.float64) for side in (labels, predictions))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(labels: Array, predictions: Array) -> float:
    """The correlation of ranks, ties at their mean rank; 0 where one side is constant."""
    return pearson(_ranks(labels), _ranks(predictions))


METRICS: Mapping[str, Metric] = {rule.__name__: rule for rule in (accuracy, matthews, f1, pearson, spearman)}


def bootstrap(statistic: Callable[[Array], float], count: int, resamples: int, seed: list[int]) -> Draws:
    """The statistic of `resamples` samples of `count` rows, drawn with replacement from `count` rows (Efron 1979).

    `statistic` takes the rows' indices (count,). Returns (resamples,). The same seed draws the same rows.
    """
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, count, count)) for _ in range(resamples)], dtype=np.float64)


def interval(draws: Draws) -> tuple[float, float]:
    """The middle 95 % of the draws: the percentile interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _ranks(values: Array) -> Array:
    """Ranks from 1, the mean of their ranks for equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[place]
    return ranks
