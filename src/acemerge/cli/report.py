"""`acemerge report`: the page of a finished merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from acemerge.cli.options import Debug, Quiet
from acemerge.cli.progress import progress
from acemerge.cli.text import say


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command()
    def report(
        out: Annotated[Path, typer.Argument(metavar="OUT", help="folder that acemerge wrote")],
        target: Annotated[Path | None, typer.Option("-o", "--out", help="the page [default: OUT/report.html]")] = None,
        scores: Annotated[
            Path | None,
            typer.Option(help="evaluation.json of `evaluate` or `compare` [default: OUT/evaluation.json, if there]"),
        ] = None,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Write one HTML page about a finished merge: what was done, where experts disagree, spectra, hashes."""
        from acemerge.report.write import write_report

        with progress(err_console, quiet) as on_progress:
            path = write_report(out, target, on_progress, scores)
        if not quiet:
            say(out_console, f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")
