"""What several commands print: plain lines, tables, sizes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from acemerge.errors import addressed, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from acemerge.output.merge_report import MergeReport

_NAMED = 3  # tensors in one line


@functools.cache
def stdout() -> Console:
    """Where results go. Nobody reads a pipe at 80 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout and sys.stdout.isatty() else 200)


@functools.cache
def stderr() -> Console:
    """Where it is said how the work gets on."""
    from rich.console import Console

    return Console(stderr=True)


def is_live(console: Console) -> bool:
    """Whether someone looks at a terminal that can be drawn on again. `FORCE_COLOR` makes none of a pipe."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def adapter(console: Console, report: MergeReport) -> None:
    """What an output that is an adapter holds and lacks."""
    manifest = report.manifest
    inside = manifest["stored"]
    outside = [name for name, record in report.records.items() if record.energy and name not in inside]
    if outside:
        some = f"{', '.join(outside[:_NAMED])}{' and others' if len(outside) > _NAMED else ''}"
        count = f"{len(outside)} tensor{'s' if len(outside) > 1 else ''}"
        say(console, f"warning: {count} changed that a LoRA of linear layers cannot hold, all of it lost: {some}")
    for label, heads in manifest["heads"].items():
        for name in heads:
            say(console, f"warning: {name} is not in the adapter: kept in heads/{label}.safetensors")
    lost = f"{manifest['share_lost']:.2%} of the energy lost in all"
    rank = manifest["recipe"]["as_lora"]
    say(console, f"{report.out}: adapter of {len(inside)} layers, rank {rank}, {lost}")


def table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[str] = ()
) -> None:
    """A plain table; `numeric` columns stand at the right."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(cell(column), overflow="fold", justify="right" if column in numeric else "left")
    for row in rows:
        grid.add_row(*map(cell, row))
    console.print(grid)


def cell(value: object) -> Text:
    """Names from files are never read as markup, nor reach a terminal as an order to it."""
    from rich.text import Text

    return Text(printable(addressed(value)))


def say(console: Console, text: str, wrap: bool = False) -> None:
    """One line of plain text, as of `cell`. On a terminal a sentence may be broken between words, which paths and
    commands to copy must not be.
    """
    console.print(cell(text), soft_wrap=not (wrap and console.is_terminal))


def print_json(value: Any) -> None:
    """One object on stdout; figures that are none, which JSON has no words for, are null."""
    clean = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    stdout().file.write(json.dumps(clean) + "\n")


def outcome(report: MergeReport) -> dict[str, Any]:
    """Of an output that was written, as JSON."""
    from acemerge.checkpoints import files
    from acemerge.checkpoints.unfinished import MANIFEST
    from acemerge.output.names import REPORT

    assert report.out is not None
    manifest, page = report.manifest, report.out / REPORT
    adapter = (
        {"layers": len(manifest["stored"]), "share_lost": manifest["share_lost"]} if "stored" in manifest else None
    )
    return {
        "out": addressed(report.out),
        "manifest": None if report.part else addressed(report.out / MANIFEST),
        "part": report.part,
        "was_complete": report.was_complete,
        "experts": manifest["experts"],
        "tensors": len(report.tensors),
        "rules": report.rules,
        "bytes": report.bytes_written,
        "seconds": manifest["seconds"],
        "warnings": manifest["warnings"],
        "adapter": adapter,
        "report": addressed(page) if files.kind(page) == "file" else None,
        "pushed": report.pushed,
    }


def size(count: float) -> str:
    """Bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """For people: 4 s, 3 min, 1.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
