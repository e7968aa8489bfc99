"""`acemerge ui`: the page for a browser."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from acemerge.cli.options import Debug
from acemerge.cli.text import say


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command()
    def ui(
        folders: Annotated[
            list[Path] | None,
            typer.Argument(metavar="[FOLDER]...", help="where models are and outputs go [default: the current folder]"),
        ] = None,
        host: Annotated[
            str, typer.Option(help="address to listen at; any but 127.0.0.1 is open to others")
        ] = "127.0.0.1",
        port: Annotated[int | None, typer.Option(help="port to listen at [default: 7860, or a free one]")] = None,
        debug: Debug = False,
    ) -> None:
        """Merge in a browser, on this machine: pick models and a rule, look, merge, open the report."""
        from acemerge.ui.folders import Folders
        from acemerge.ui.server import Server

        server = Server(Folders(folders or [Path()]), host, port)
        say(out_console, f"open {server.address}\nstop with Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
