"""`acemerge evaluate`: a model's scores."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.options import MODELS, TELLING, Options, option
from acemerge.cli.text import cell, print_json, say, stderr, stdout
from acemerge.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.evaluation.evaluate import OnTaskProgress
    from acemerge.evaluation.tables import Evaluation
    from acemerge.evaluation.unkept import Unkept
    from acemerge.tasks.task_file import Tasks

TaskFile = Annotated[Path, option(MODELS, "the tasks, see docs/evaluate.md", "--tasks", metavar="TASKS.yaml")]


@command(
    "evaluate",
    group="Judge",
    takes=("base", "out", "overwrite", "device", *TELLING),
    examples=(
        "acemerge evaluate ./merged --tasks tasks.yaml",
        "acemerge evaluate ./math-lora --base ./base --tasks tasks.yaml -o ./scores",
    ),
    page="evaluate.md",
    helps={
        "base": "what adapters come from, if they do not say",
        "out": "folder for JSON, table and picture",
        "overwrite": "replace an earlier evaluation",
    },
)
def evaluate(
    asked: Options,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, Hub id or address")],
    tasks: TaskFile,
) -> None:
    """Score a model on every task, beside the tasks' own experts."""
    from acemerge.engine.opening import check_output_apart
    from acemerge.evaluation.results import check_free
    from acemerge.recipes.labels import expert_labels
    from acemerge.tasks.task_file import load_tasks

    found = load_tasks(tasks)
    if asked.out is not None:
        check_output_apart(asked.out, [model])
        check_free(asked.out, asked.overwrite)
    score(asked, dict(zip(expert_labels([model]), [model], strict=True)), found, asked.base)


def score(
    asked: Options, models: Mapping[str, str], tasks: Tasks, base: str | None, unkept: Unkept | None = None
) -> None:
    """Score the models, and those that are merged for it and not kept; write what was asked for, and show the table."""
    from acemerge.engine.devices import find_devices
    from acemerge.evaluation.evaluate import Run
    from acemerge.evaluation.evaluate import evaluate as scores_of
    from acemerge.evaluation.results import write_results

    with logged_progress() if asked.logs else examples_progress(stderr(), asked.quiet) as on_progress:
        device = find_devices(asked.device)[0]
        run = Run(tasks, device, on_progress, asked.quiet, base)
        found = scores_of(models, run) if unkept is None else unkept.evaluate(models, run)
    recipes = unkept.recipes if unkept else None
    missing = None if asked.out is None else write_results(found, tasks, dict(models), asked.out, recipes)
    if asked.as_json:
        print_json({**found.as_table(), "out": None if asked.out is None else str(asked.out)})
    elif not asked.quiet:
        show(stdout(), found, asked.out, missing)


@contextlib.contextmanager
def logged_progress() -> Iterator[OnTaskProgress]:
    """An event for each batch of examples."""
    log = logging.getLogger(__name__)

    def told(name: str, done: int, total: int) -> None:
        fields = {"stage": "evaluate", "name": name, "done": done, "total": total, "unit": "examples"}
        log.debug("%s: %d of %d examples", name, done, total, extra={"event": "progress", "fields": fields})

    yield told


@contextlib.contextmanager
def examples_progress(console: Console, quiet: bool) -> Iterator[OnTaskProgress]:
    """A live bar on a terminal, a line for each model and task elsewhere, nothing when quiet."""
    if quiet:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield lambda name, done, total: say(console, f"{name}: {total} done") if done == total else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True) as bar:
        task, shown = bar.add_task("", total=None), ""

        def on_progress(name: str, done: int, total: int) -> None:
            nonlocal shown
            if name != shown:
                bar.reset(task)
                shown = name
            bar.update(task, completed=done, total=total, description=printable(name))

        yield on_progress


def show(console: Console, found: Evaluation, out: Path | None, missing: str | None) -> None:
    from rich.table import Table

    from acemerge.evaluation.tables import LEGEND

    header, rows = found.marked()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(header):
        table.add_column(cell(column), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    console.print(table)
    say(console, LEGEND)
    if missing is not None:
        say(console, missing)
    if out is not None:
        say(console, f"{out}: evaluation.json and evaluation.md{'' if missing else ', evaluation.png'}")
