"""`acemerge ui`: the page for a browser."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.options import RUNNING, Options, option
from acemerge.cli.text import is_live, say, stderr, stdout


@command(
    "ui",
    group="More",
    takes=(),
    examples=("acemerge ui ./models", "acemerge ui ./models ./outputs --port 8000"),
    page="ui.md",
)
def ui(
    asked: Options,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="where models are and outputs go [default: the current folder]"),
    ] = None,
    host: Annotated[str, option(RUNNING, "address to listen at; any but 127.0.0.1 is open to others")] = "127.0.0.1",
    port: Annotated[int | None, option(RUNNING, "port to listen at [default: 7860, or a free one]")] = None,
) -> None:
    """Merge in a browser, on this machine: pick models and a rule, look, merge, open the report."""
    if is_live(stderr()):
        say(stderr(), "starting, which takes some seconds ...")
    from acemerge.ui.folders import Folders
    from acemerge.ui.server import Server

    server = Server(Folders(folders or [Path()]), host, port)
    say(stdout(), f"open {server.address}")
    say(stdout(), "stop with Ctrl-C")
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
