"""What an evaluation found, for the report page: from the `evaluation.json` of `acemerge evaluate` or `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from acemerge.checkpoints import files
from acemerge.checkpoints.header import parse_json
from acemerge.errors import CheckpointError

SCORES = "evaluation.json"
_CURE = "name the evaluation.json of acemerge evaluate or compare, or make it again"
_MOST = 32 << 20  # bytes of a file that is looked at

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Score(TypedDict):
    score: _Number
    interval: tuple[_Number, _Number]
    metrics: dict[str, _Number]


class _Average(TypedDict):
    value: _Number
    interval: tuple[_Number, _Number]


class _Row(TypedDict):
    tasks: dict[str, _Score]
    mean: _Average | None
    normalised: _Average | None


class _Evaluation(TypedDict):
    """What the page relies on."""

    format: Literal["acemerge-evaluation-1"]
    rows: dict[str, _Row]
    models: NotRequired[dict[str, str]]


_SHAPE = TypeAdapter(_Evaluation)


@dataclass(frozen=True)
class Scores:
    """`tasks` are the columns and `rows` the models, each with a cell for every task and two for its means, empty where
    unknown; `points` are what the chart draws. `merged` is the row of this very output, where there is one.
    """

    source: str
    tasks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    points: tuple[Mapping[str, Any], ...]
    merged: str | None


def find_scores(out: Path, given: Path | None) -> Scores | None:
    """The scores in a file, or in the folder that holds it; without one, those that lie in OUT, if any.

    Raises CheckpointError where there are none, or for what is no evaluation.
    """
    path = out / SCORES if given is None else given / SCORES if files.kind(given) == "folder" else given
    if given is None and files.kind(path) != "file":
        return None
    if files.kind(path) == "nothing":
        raise CheckpointError(path, "no such file", _CURE)
    return scores_of(parse_json(files.read_small(path, _MOST), path, _CURE), path, out)


def scores_of(content: Any, path: Path, out: Path) -> Scores:
    """The scores of a table as `evaluation.json` has it. CheckpointError for another."""
    try:
        found = _SHAPE.validate_python(content)
    except ValidationError as failure:
        place = ".".join(map(str, failure.errors()[0]["loc"])) or "its beginning"
        raise CheckpointError(path, f"is no evaluation: {place!r} is not as expected", _CURE) from None
    rows = found["rows"]
    tasks = tuple(dict.fromkeys(task for row in rows.values() for task in row["tasks"]))
    home = files.resolve(out)
    merged = [n for n, model in found.get("models", {}).items() if n in rows and files.resolve(Path(model)) == home]
    cells = tuple(
        (name, (*(_cell(row["tasks"].get(task)) for task in tasks), _mean(row["mean"]), _mean(row["normalised"])))
        for name, row in rows.items()
    )
    points = tuple(
        {
            "model": name,
            "task": task,
            "kind": "perplexity" if _is_perplexity(score) else "score",
            "score": _unit(score) * score["score"],
            "low": _unit(score) * score["interval"][0],
            "high": _unit(score) * score["interval"][1],
            "merged": name in merged,
        }
        for name, row in rows.items()
        for task, score in row["tasks"].items()
    )
    return Scores(str(path), tasks, cells, points, merged[0] if merged else None)


def _is_perplexity(score: _Score) -> bool:
    return set(score["metrics"]) == {"perplexity"}


def _unit(score: _Score) -> int:
    """Scores are shown in percent, perplexities as they are."""
    return 1 if _is_perplexity(score) else 100


def _cell(score: _Score | None) -> str:
    if score is None:
        return ""
    unit, form = _unit(score), ".2f" if _is_perplexity(score) else ".1f"
    low, high = (f"{unit * end:{form}}" for end in score["interval"])
    return f"{unit * score['score']:{form}} [{low}, {high}]"


def _mean(mean: _Average | None) -> str:
    if mean is None:
        return ""
    low, high = (f"{100 * end:.1f}" for end in mean["interval"])
    return f"{100 * mean['value']:.1f} [{low}, {high}]"
