"""`acemerge verify`: whether an output is as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from acemerge.checkpoints.named import location
from acemerge.cli.command import command
from acemerge.cli.options import Options
from acemerge.cli.text import print_json, say, size, stdout
from acemerge.errors import addressed


@command(
    "verify",
    group="Judge",
    takes=("as_json",),
    examples=("acemerge verify ./merged", "acemerge verify ./merged && rsync -a ./merged server:models/"),
    page="reliability.md",
)
def verify(
    asked: Options,
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", parser=location, help="folder or address that acemerge wrote")
    ],
) -> None:
    """Check hashes, completeness and finiteness of an output folder."""
    from acemerge.output import verify as output

    manifest = output.verify(folder)
    if asked.as_json:
        files = manifest["outputs"]
        total = sum(entry["bytes"] for entry in files.values())
        about = {"files": len(files), "tensors": len(manifest["tensors"]), "bytes": total}
        print_json({"out": addressed(folder), **about, "created": manifest["created"]})
    else:
        say(stdout(), verified(folder, manifest))


def verified(out: Path, manifest: Mapping[str, Any]) -> str:
    """What was found to be right."""
    files = manifest["outputs"]
    total = size(sum(entry["bytes"] for entry in files.values()))
    return f"{out}: {len(files)} files, {len(manifest['tensors'])} tensors, {total}, all as written"
