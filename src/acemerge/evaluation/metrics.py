"""GLUE's metrics, and how far chance moves them: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from acemerge.errors import UsageError

Values = npt.NDArray[Any]
Draws = npt.NDArray[np.float64]
Metric = Callable[[Values, Values], float]


def accuracy(labels: Values, predictions: Values) -> float:
    """The share of examples whose class was found."""
    return float(np.mean(labels == predictions))


def matthews(labels: Values, predictions: Values) -> float:
    """Matthews' correlation, for any number of classes (Gorodkin 2004); 0 where one side is constant."""
    return float(_sklearn().matthews_corrcoef(labels, predictions))


def f1(labels: Values, predictions: Values) -> float:
    """`2 TP / (2 TP + FP + FN)` of class 1 of two; 0 where neither side has it."""
    return float(_sklearn().f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def pearson(labels: Values, predictions: Values) -> float:
    """The linear correlation; 0 where one side is constant."""
    return _correlation("pearsonr", labels, predictions)


def spearman(labels: Values, predictions: Values) -> float:
    """The correlation of ranks, ties at their mean rank; 0 where one side is constant."""
    return _correlation("spearmanr", labels, predictions)


METRICS: Mapping[str, Metric] = {rule.__name__: rule for rule in (accuracy, matthews, f1, pearson, spearman)}


def bootstrap(statistic: Callable[[Values], float], count: int, resamples: int, seed: list[int]) -> Draws:
    """The statistic of `resamples` samples of `count` rows, drawn with replacement from `count` rows (Efron 1979).

    `statistic` takes the rows' indices (count,). Returns (resamples,). The same seed draws the same rows.
    """
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, count, count)) for _ in range(resamples)], dtype=np.float64)


def interval(draws: Draws) -> tuple[float, float]:
    """The middle 95 % of the draws: the percentile interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _correlation(name: str, labels: Values, predictions: Values) -> float:
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(getattr(_scipy(), name)(labels, predictions).statistic)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise UsageError("metrics", "scikit-learn is not installed", "pip install 'acemerge[eval]'") from None
    return metrics


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise UsageError("metrics", "scipy is not installed", "pip install 'acemerge[eval]'") from None
    return stats
