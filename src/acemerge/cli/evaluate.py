"""The commands `evaluate` and `compare`: parsing and printing only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from acemerge.cli.options import Calibration, Debug, Device, Quiet
from acemerge.cli.text import say
from acemerge.engine.opening import RunOptions, check_output_apart, find_devices
from acemerge.errors import UsageError
from acemerge.evaluation.compare import by_methods, folders_of, merge_all, rows, with_experts
from acemerge.evaluation.evaluate import OnProgress, Run, evaluate
from acemerge.evaluation.results import check_free, write_results
from acemerge.evaluation.tables import LEGEND, Evaluation
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.recipe import Recipe, load_recipe, make_recipe
from acemerge.tasks.task_file import Tasks, load_tasks

TaskFile = Annotated[Path, typer.Option("--tasks", metavar="TASKS.yaml", help="the tasks, see docs/evaluate.md")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier evaluation and unlike merges")]


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add both commands."""

    def run(models: dict[str, str], tasks: Tasks, out: Path | None, device: str, quiet: bool, base: str | None) -> None:
        with examples_progress(err_console, quiet) as on_progress:
            found = evaluate(models, Run(tasks, find_devices(device)[0], on_progress, quiet, base))
        missing = None if out is None else write_results(found, tasks, models, out)
        if not quiet:
            show(out_console, found, out, missing)

    @app.command("evaluate")
    def evaluate_command(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id")],
        tasks: TaskFile,
        base: Annotated[str | None, typer.Option(help="what adapters come from, if they do not say")] = None,
        out: Annotated[Path | None, typer.Option("-o", "--out", help="folder for JSON, table and picture")] = None,
        device: Device = "cpu",
        overwrite: Overwrite = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Score a model on every task, beside the tasks' own experts."""
        asked = load_tasks(tasks)
        if out is not None:
            check_output_apart(out, [model])
            check_free(out, overwrite)
        run(_named([model]), asked, out, device, quiet, base)

    @app.command("compare")
    def compare_command(
        tasks: TaskFile,
        models: Annotated[
            list[str] | None, typer.Argument(metavar="[MODEL...] [RECIPE.yaml]", help="models, and a recipe to merge")
        ] = None,
        out: Annotated[Path | None, typer.Option("-o", "--out", help="folder for results and merges")] = None,
        base: Annotated[str | None, typer.Option(help="what all experts come from, in the place of a recipe")] = None,
        expert: Annotated[list[str] | None, typer.Option("--expert", help="an expert; repeat for each")] = None,
        methods: Annotated[str | None, typer.Option(help="rules to merge by, as ace,actmat,tsv_m")] = None,
        calibration: Calibration = None,
        device: Device = "cpu",
        overwrite: Overwrite = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Score models side by side; with --methods, merge by each rule first."""
        if out is None:
            raise UsageError("command line", "-o is missing", "name the output folder with -o OUT")
        asked, given = load_tasks(tasks), _named([name for name in models or [] if not _is_recipe(name)])
        keys = {"base": base, "experts": expert, "calibration": calibration}
        recipe = _recipe([name for name in models or [] if _is_recipe(name)], keys)
        check_output_apart(out, list(given.values()))
        check_free(out, overwrite)
        if (recipe is None) != (methods is None):
            what, cure = ("--methods is missing", "name rules, as --methods ace,actmat")
            if recipe is None:
                what, cure = ("nothing to merge", "give a recipe file, or --base and --expert")
            raise UsageError("command line", what, cure)
        if recipe is not None and methods is not None:
            options = RunOptions(device, overwrite=overwrite, quiet=quiet)
            recipes = by_methods(recipe, [name.strip() for name in methods.split(",")])
            asked, given = with_experts(asked, recipe), rows(recipe.base, given, folders_of(recipes, out))
            merge_all(recipes, out, options, lambda text: None if quiet else say(err_console, text))
        elif not given:
            raise UsageError("command line", "nothing to compare", "name models, or a recipe and --methods")
        run(given, asked, out, device, quiet, None if recipe is None else recipe.base)


def _named(models: list[str]) -> dict[str, str]:
    return dict(zip(expert_labels(models), models, strict=True))


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _recipe(files: list[str], asked: dict[str, Any]) -> Recipe | None:
    keys = {key: value for key, value in asked.items() if value}
    if len(files) > 1:
        raise UsageError("command line", "two recipes", "give one")
    if files:
        return load_recipe(Path(files[0]), keys)
    return make_recipe(keys, "command line") if keys else None


@contextlib.contextmanager
def examples_progress(console: Console, quiet: bool) -> Iterator[OnProgress]:
    """A live bar on a terminal, a line for each model and task elsewhere, nothing when quiet."""
    if quiet:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield lambda name, done, total: say(console, f"{name}: {total} done") if done == total else None
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True) as bar:
        task, shown = bar.add_task("", total=None), ""

        def on_progress(name: str, done: int, total: int) -> None:
            nonlocal shown
            if name != shown:
                bar.reset(task)
                shown = name
            bar.update(task, completed=done, total=total, description=name)

        yield on_progress


def show(console: Console, found: Evaluation, out: Path | None, missing: str | None) -> None:
    header, rows = found.cells()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(header):
        table.add_column(Text(column), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    say(console, LEGEND)
    if missing is not None:
        say(console, missing)
    if out is not None:
        say(console, f"{out}: evaluation.json and evaluation.md{'' if missing else ', evaluation.png'}")
