"""Published scores beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from acemerge.evaluation.metrics import interval
from acemerge.evaluation.tables import Evaluation, Row, mean, normalised
from acemerge.reproduction.pack import MEAN, OF_EXPERTS, Pack


@dataclass(frozen=True)
class Line:
    """One published score and ours, in percent; `interval` is ours of 95 %."""

    row: str
    task: str
    source: str
    published: float
    ours: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.ours - self.published


def compare(evaluation: Evaluation, pack: Pack) -> list[Line]:
    """Every published score that has one of ours beside it, in the pack's order.

    Means are compared where all of the pack's tasks were scored, and not over some of them.
    """
    whole = set(evaluation.tasks) == set(pack.task_names)
    rows = {row.name: _percents(row, evaluation.experts, whole) for row in evaluation.rows}
    return [
        Line(found.row, task, found.source, published, *rows[found.row][task])
        for found in pack.published
        if found.row in rows
        for task, published in found.scores.items()
        if task in rows[found.row]
    ]


def _percents(row: Row, experts: Row | None, whole: bool) -> dict[str, tuple[float, tuple[float, float]]]:
    """Our score and its interval by the task's name, and those of the means."""
    found = {score.task: (score.score, interval(score.draws)) for score in row.known() if not score.is_perplexity}
    if whole:
        means = {MEAN: mean(row), OF_EXPERTS: normalised(row, experts)}
        found |= {name: (average.value, average.interval) for name, average in means.items() if average is not None}
    return {name: (100 * value, (100 * ends[0], 100 * ends[1])) for name, (value, ends) in found.items()}


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The table for people."""
    header = ["", "task", "published", "ours", "difference", "source"]
    rows = []
    for line in lines:
        ours = f"{line.ours:.1f} [{line.interval[0]:.1f}, {line.interval[1]:.1f}]"
        rows.append([line.row, line.task, f"{line.published:.1f}", ours, f"{line.difference:+.1f}", line.source])
    return header, rows


def markdown(pack: Pack, subset: str, lines: Sequence[Line], evaluation: Evaluation, inputs: Sequence[str]) -> str:
    """The whole result: what it is of, published beside ours, all of ours, where all of it is from."""
    parts = [f"# {pack.title}"]
    if subset:
        parts.append(f"**A subset: {subset}.** Scores on other examples than the published ones differ by chance, too.")
    if lines:
        header, rows = cells(lines)
        table = [header, ["---", "---", "--:", "--:", "--:", "---"], *rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    else:
        parts.append("Nothing that was published stands beside these scores.")
    parts += [evaluation.markdown().rstrip()]
    used = {line.source for line in lines}
    about = [f"- {name}: {s.title}, {s.url}; {s.note}." for name, s in pack.sources.items() if name in used]
    parts.append("\n".join([*about, *(f"- {note}" for note in pack.notes)]))
    parts.append("\n".join(["Inputs:", "", *(f"- {name}" for name in inputs)]))
    return "\n\n".join(parts) + "\n"
