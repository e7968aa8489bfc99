"""What `evaluate` and `compare` print: progress, then the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from acemerge.evaluation.run import OnProgress
from acemerge.evaluation.tables import LEGEND, Evaluation


@contextlib.contextmanager
def progress(console: Console, quiet: bool) -> Iterator[OnProgress]:
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


def evaluation(console: Console, found: Evaluation, out: Path | None, missing: str | None) -> None:
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


def say(console: Console, text: str) -> None:
    """Plain text: names from files are never read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
