"""A pack from its inputs to the table: merges and scores that are there already are not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from acemerge.engine.devices import find_devices
from acemerge.engine.run_options import RunOptions
from acemerge.evaluation.compare import merge_all, merged_folders, rows
from acemerge.evaluation.evaluate import OnTaskProgress, Run, evaluate
from acemerge.evaluation.results import write_results
from acemerge.evaluation.tables import Evaluation
from acemerge.output.manifest import versions
from acemerge.output.writer import write_file
from acemerge.reproduction.comparison import Line, compare, markdown
from acemerge.reproduction.inputs import PackInput, data_folders, fetch
from acemerge.reproduction.pack import Pack, recipes_of, tasks_of
from acemerge.reproduction.scores import kept_in

FORMAT = "acemerge-reproduction-1"
JSON, TABLE = "reproduction.json", "reproduction.md"


@dataclass(frozen=True)
class Asked:
    """What of a pack is to be reproduced: all of its rules and tasks, on all examples, unless it says otherwise."""

    pack: Pack
    rules: Sequence[str]
    tasks: Sequence[str]
    limit: int | None = None

    @property
    def subset(self) -> str:
        """In words what is left out of the scores; empty where nothing is. Rules do not change each other's."""
        parts = []
        if len(self.tasks) < len(self.pack.tasks):
            parts.append(f"{len(self.tasks)} of {len(self.pack.tasks)} tasks")
        if self.limit is not None:
            parts.append(f"at most {self.limit:,} examples of each")
        return ", ".join(parts)


@dataclass(frozen=True)
class Reproduced:
    """Ours, the published scores beside them, and why there is no picture, if there is none."""

    evaluation: Evaluation
    lines: Sequence[Line]
    missing: str | None


def reproduce(
    asked: Asked,
    inputs: Sequence[PackInput],
    out: Path,
    options: RunOptions,
    tell: Callable[[str], None],
    on_progress: OnTaskProgress,
) -> Reproduced:
    """Fetch, merge by each rule, score base, experts and merges, and write the tables into `out`."""
    pack = asked.pack
    if any(entry.to_fetch() for entry in inputs):
        tell("fetching")
    places, data = fetch(inputs, out, options)
    recipes = recipes_of(pack, asked.rules, places)
    tasks = tasks_of(pack, asked.tasks, places, data_folders(pack, asked.tasks, data), asked.limit)
    merge_all(recipes, out, options, tell)
    models = rows(places[pack.base], {}, recipes) | merged_folders(recipes, out)
    run = Run(tasks, find_devices(options.device)[0], on_progress, options.quiet)
    evaluation = evaluate(models, run, kept_in(out / "scores"))
    lines = compare(evaluation, pack)
    missing = write_results(evaluation, tasks, models, out)
    _write(asked, inputs, evaluation, lines, out)
    return Reproduced(evaluation, lines, missing)


def _write(asked: Asked, inputs: Sequence[PackInput], evaluation: Evaluation, lines: Sequence[Line], out: Path) -> None:
    names = [f"{entry.name} at {entry.commit}" for entry in inputs]
    write_file(out / TABLE, markdown(asked.pack, asked.subset, lines, evaluation, names).encode())
    content = {
        "format": FORMAT,
        "title": asked.pack.title,
        "subset": asked.subset or None,
        "lines": [asdict(line) | {"difference": line.difference} for line in lines],
        "sources": {name: source.model_dump() for name, source in asked.pack.sources.items()},
        "notes": list(asked.pack.notes),
        "inputs": [{k: v for k, v in asdict(entry).items() if k != "sizes"} for entry in inputs],
        "evaluation": evaluation.as_table(),
        "versions": versions(),
    }
    write_file(out / JSON, json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
