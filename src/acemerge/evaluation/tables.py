"""What an evaluation found, as numbers, as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from acemerge.evaluation.metrics import Draws, interval
from acemerge.inspection.png import literal, new_figure, png_bytes
from acemerge.output.markdown import plain

FORMAT = "acemerge-evaluation-1"
EXPERTS = "experts"


@dataclass(frozen=True)
class Score:
    """One model on one task. `score` is the mean of `metrics`, or a perplexity; `draws` are the bootstrap's.

    `about` says what else is worth knowing: examples, truncated ones, where the head is from, seconds.
    """

    task: str
    score: float
    metrics: Mapping[str, float]
    draws: Draws = field(repr=False)
    about: dict[str, Any]
    is_perplexity: bool = False

    def as_table(self) -> dict[str, Any]:
        return {"score": self.score, "interval": interval(self.draws), "metrics": dict(self.metrics), **self.about}


@dataclass(frozen=True)
class Row:
    """One model on every task, in the tasks' order; None where a task has no such model."""

    name: str
    scores: tuple[Score | None, ...]

    def known(self) -> list[Score]:
        return [score for score in self.scores if score is not None]


@dataclass(frozen=True)
class MeanScore:
    """A mean over tasks and its 95 % interval."""

    value: float
    interval: tuple[float, float]
    tasks: int


def mean(row: Row) -> MeanScore | None:
    """The mean score over the tasks that are no perplexities; None unless all of them are known."""
    if None in row.scores:
        return None
    scores = [score for score in row.known() if not score.is_perplexity]
    return _average([(score.score, score.draws) for score in scores])


def normalised(row: Row, experts: Row | None) -> MeanScore | None:
    """The mean over tasks of score / the expert's score (of a perplexity its inverse); None without any expert.

    Tasks whose expert scores nothing above 0 are left out. The experts' scores are taken as they are: the interval is
    that of the model's scores alone.
    """
    if experts is None:
        return None
    if row is experts:
        return MeanScore(1.0, (1.0, 1.0), len(row.known()))
    ratios = []
    for score, best in zip(row.scores, experts.scores, strict=True):
        if score is not None and best is not None and best.score > 0:
            ratios.append(_ratio(score, best.score))
    return _average(ratios)


def _ratio(score: Score, best: float) -> tuple[float, Draws]:
    if score.is_perplexity:
        return best / score.score, best / score.draws
    return score.score / best, score.draws / best


def _average(parts: Sequence[tuple[float, Draws]]) -> MeanScore | None:
    """Tasks are drawn independently of each other, so the i-th draws of all are a draw of their mean."""
    if not parts:
        return None
    draws = np.mean([draws for _, draws in parts], axis=0)
    return MeanScore(float(np.mean([value for value, _ in parts])), interval(draws), len(parts))


@dataclass(frozen=True)
class Evaluation:
    """Rows of models on tasks; the row of the experts, each on its own task, is the measure of the others."""

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def experts(self) -> Row | None:
        return next((row for row in self.rows if row.name == EXPERTS), None)

    def as_table(self) -> dict[str, Any]:
        """What `evaluation.json` holds; scores are fractions of 1, perplexities as they are."""
        rows = {}
        for row in self.rows:
            averages = {"mean": mean(row), "normalised": normalised(row, self.experts)}
            rows[row.name] = {
                "tasks": {score.task: score.as_table() for score in row.known()},
                **{name: None if a is None else vars(a) for name, a in averages.items()},
            }
        return {"format": FORMAT, "rows": rows}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table for people: percent, and for perplexities the number itself, with 95 % intervals."""
        header = ["", *self.tasks, "mean", "of experts"]
        rows = []
        for row in self.rows:
            cells = [_cell(score.score, interval(score.draws), score.is_perplexity) if score else "-"
                     for score in row.scores]  # fmt: skip
            averages = (mean(row), normalised(row, self.experts))
            rows.append([row.name, *cells, *(_cell(a.value, a.interval) if a else "-" for a in averages)])
        return header, rows

    def marked(self) -> tuple[list[str], list[list[str]]]:
        """The same, where columns of perplexities say so and the best of several models is marked in each column."""
        header, rows = self.cells()
        others = [i for i, row in enumerate(self.rows) if row.name != EXPERTS]
        for column, values in enumerate(self._columns(), 1):
            known = {i: value for i in others if (value := values[i]) is not None}
            if len(others) > 1 and known:
                best = max(known.values())
                for i in (i for i, value in known.items() if value == best):
                    rows[i][column] += " *"
        lower = {score.task for row in self.rows for score in row.known() if score.is_perplexity}
        return [f"{name} (perplexity)" if name in lower else name for name in header], rows

    def _columns(self) -> list[list[float | None]]:
        """Of every column the rows' figures, of which the largest is the best; of perplexities they are negative."""
        columns = zip(*(row.scores for row in self.rows), strict=True)
        averages = [mean(row) for row in self.rows], [normalised(row, self.experts) for row in self.rows]
        return [
            *([None if s is None else -s.score if s.is_perplexity else s.score for s in scores] for scores in columns),
            *([None if a is None else a.value for a in column] for column in averages),
        ]

    def markdown(self) -> str:
        header, rows = self.marked()
        named = [[plain(row[0]), *row[1:]] for row in rows]
        lines = [map(plain, header), ["---", *("--:" for _ in header[1:])], *named]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n{LEGEND}\n"


LEGEND = (
    "Percent, with 95 % bootstrap intervals over examples; perplexities as they are, the lower the better, and no part "
    "of the mean. `*` marks the best of a column, the experts' own row aside. "
    "`of experts`: mean over tasks of score / the score of the task's own expert."
)


def _cell(value: float, ends: tuple[float, float], plain: bool = False) -> str:
    unit, form = (1, ".2f") if plain else (100, ".1f")
    low, high = (f"{unit * end:{form}}" for end in ends)
    return f"{unit * value:{form}} [{low}, {high}]"


def picture(evaluation: Evaluation) -> bytes:
    """A PNG: for every task a bar for each row, with its interval; perplexities on a scale of their own."""
    known = {score.task: score for row in evaluation.rows for score in row.known()}
    kinds = [[t for t in evaluation.tasks if t in known and known[t].is_perplexity is kind] for kind in (False, True)]
    panels = [(tasks, kind) for tasks, kind in zip(kinds, (False, True), strict=True) if tasks]
    widths = [max(3.0, 0.25 * len(tasks) * (len(evaluation.rows) + 1)) for tasks, _ in panels]
    figure = new_figure(sum(widths) + 2, 4)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (tasks, is_perplexity) in zip(axes, panels, strict=True):
        _bars(axis, evaluation.rows, tasks, 1 if is_perplexity else 100)
        axis.set_ylabel("perplexity (lower is better)" if is_perplexity else "score, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)), frameon=False)
    return png_bytes(figure)


def _bars(axis: Any, rows: Sequence[Row], tasks: Sequence[str], unit: int) -> None:
    width = 1 / (len(rows) + 1)
    for i, row in enumerate(rows):
        found = [(tasks.index(score.task), score) for score in row.known() if score.task in tasks]
        if not found:
            continue
        ends = [interval(score.draws) for _, score in found]
        # The interval of a percentile bootstrap may lie beside the point.
        below = [unit * max(0.0, score.score - low) for (_, score), (low, _) in zip(found, ends, strict=True)]
        above = [unit * max(0.0, high - score.score) for (_, score), (_, high) in zip(found, ends, strict=True)]
        places = [place + (i - (len(rows) - 1) / 2) * width for place, _ in found]
        heights = [unit * score.score for _, score in found]
        axis.bar(places, heights, width, yerr=(below, above), capsize=2, label=literal(row.name))
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.spines[["top", "right"]].set_visible(False)
