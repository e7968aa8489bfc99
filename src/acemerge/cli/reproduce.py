"""`acemerge reproduce`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from acemerge.cli import evaluate
from acemerge.cli import text as show
from acemerge.cli.options import AllowPickle, Debug, Device, Overwrite, Quiet
from acemerge.engine.opening import RunOptions
from acemerge.errors import UsageError
from acemerge.reproduction.comparison import cells
from acemerge.reproduction.inputs import PackInput, find_inputs
from acemerge.reproduction.pack import PACKS, chosen_of, load_pack
from acemerge.reproduction.reproduce import TABLE, Asked, reproduce


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command("reproduce")
    def reproduce_command(
        pack: Annotated[str, typer.Argument(metavar="|".join(PACKS), help="which of the papers' experiments")],
        out: Annotated[Path | None, typer.Option("-o", "--out", help="folder for merges, scores and tables")] = None,
        size: Annotated[str | None, typer.Option(help="which model, where a pack has several [vit: b16]")] = None,
        methods: Annotated[str | None, typer.Option(help="some of the pack's rules, as ace,average")] = None,
        tasks: Annotated[str | None, typer.Option(help="score some of the pack's tasks only, as cola,rte")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="score at most so many examples of each task")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be fetched, and stop")] = False,
        yes: Annotated[bool, typer.Option("--yes", help="fetch without asking")] = False,
        device: Device = "cpu",
        overwrite: Overwrite = False,
        allow_pickle: AllowPickle = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Run one of the papers' experiments with its own models and data: our scores beside the published ones."""
        found = load_pack(pack, size)
        rules = chosen_of(list(found.rules), methods, "methods")
        asked = Asked(found, rules, chosen_of(found.task_names, tasks, "tasks"), limit)
        if out is None and not dry_run:
            raise UsageError("command line", "-o is missing", "name the output folder with -o OUT")
        inputs = find_inputs(found, asked.tasks, out, allow_pickle)
        missing = sum(entry.to_fetch() for entry in inputs)
        if dry_run or not quiet:
            _list(out_console, found.title, inputs, missing)
        if out is None or dry_run:
            return
        if missing and not yes and not _may_fetch(err_console, missing):
            show.say(err_console, "nothing was fetched")
            return
        options = RunOptions(device, overwrite=overwrite, allow_pickle=allow_pickle, quiet=quiet)
        with evaluate.examples_progress(err_console, quiet) as on_progress:
            result = reproduce(
                asked, inputs, out, options, lambda text: None if quiet else show.say(err_console, text), on_progress
            )
        if not quiet:
            if asked.subset:
                show.say(out_console, f"A subset: {asked.subset}.")
            header, lines = cells(result.lines)
            if lines:
                show.table(out_console, header, lines, numeric=("published", "ours", "difference"))
            evaluate.show(out_console, result.evaluation, out, result.missing)
            show.say(out_console, f"{out / TABLE}: published beside ours, with all sources and inputs")


def _list(console: Console, title: str, inputs: list[PackInput], missing: int) -> None:
    rows = [[entry.name, show.size(entry.nbytes), show.size(entry.to_fetch())] for entry in inputs]
    show.say(console, f"{title}: {len(inputs)} inputs, {show.size(missing)} to fetch into the cache of huggingface_hub")
    show.table(console, ("from the Hub", "size", "to fetch"), rows, numeric=("size", "to fetch"))


def _may_fetch(console: Console, missing: int) -> bool:
    if not console.is_terminal:
        raise UsageError("command line", f"{show.size(missing)} would be fetched", "add --yes if they may be")
    return typer.confirm(f"Fetch {show.size(missing)}?", err=True)
