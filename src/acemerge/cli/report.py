"""`acemerge report`: the page of a finished merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acemerge.checkpoints.named import location
from acemerge.cli.command import command
from acemerge.cli.options import READING, Options, option
from acemerge.cli.text import say, size, stderr, stdout


@command(
    "report",
    group="Judge",
    takes=("out", "quiet"),
    examples=("acemerge report ./merged", "acemerge report ./merged --scores ./scores/evaluation.json -o page.html"),
    page="concepts/output-folder.md",
    helps={"out": "the page [default: OUT/report.html]"},
)
def report(
    asked: Options,
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", parser=location, help="folder or address that acemerge wrote")
    ],
    scores: Annotated[
        Path | None,
        option(READING, "evaluation.json of `evaluate` or `compare` [default: OUT/evaluation.json, if there]"),
    ] = None,
) -> None:
    """Write one HTML page about a finished merge: what was done, where experts disagree, spectra, hashes."""
    from acemerge.checkpoints import files
    from acemerge.checkpoints.address import scheme_of
    from acemerge.cli.progress import progress
    from acemerge.output.names import REPORT
    from acemerge.report.write import write_report

    with progress(stderr(), asked.quiet) as on_progress:
        path = write_report(folder, asked.out, on_progress, scores)
    if not asked.quiet:
        seen = f"for a page on this machine add -o {REPORT}" if scheme_of(path) else "opens in any browser"
        say(stdout(), f"{path}: {size(files.fingerprint(path)[0])}, {seen}")
