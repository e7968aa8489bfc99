"""`acemerge convert`: a checkpoint as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acemerge.checkpoints.named import output_path
from acemerge.cli.command import command
from acemerge.cli.options import TELLING, Options
from acemerge.cli.text import outcome, print_json, say, size, stderr, stdout


@command(
    "convert",
    group="Checkpoints",
    takes=("allow_pickle", "dequantize", "stream", "overwrite", "resume", "max_shard_size", *TELLING),
    examples=(
        "acemerge convert ./old ./new --allow-pickle",
        "acemerge convert ./fp8 ./plain --dequantize --max-shard-size 2GB",
    ),
    page="memory.md",
)
def convert(
    asked: Options,
    source: Annotated[
        str, typer.Argument(metavar="IN", help="checkpoint folder, Hub id, or with --allow-pickle a .bin")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", parser=output_path, help="output folder or address")],
) -> None:
    """Write a checkpoint anew as safetensors, its values unchanged."""
    from acemerge import api
    from acemerge.cli.progress import progress
    from acemerge.engine.convert import open_conversion

    options = asked.run_options()
    opened = open_conversion(source, target, options)
    with progress(stderr(), asked.silent) as on_progress:
        report = api.run_opened(opened, target, options, on_progress)
    if asked.as_json:
        print_json(outcome(report))
    elif not asked.quiet:
        about = f"{target}: {len(report.tensors)} tensors, {size(report.bytes_written)}, manifest in acemerge.json"
        say(stdout(), f"{about}; it was complete, and was verified" if report.was_complete else about)
