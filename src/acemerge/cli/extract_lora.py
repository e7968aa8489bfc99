"""`acemerge extract-lora`: an adapter out of a full fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.options import OUTPUT, TELLING, Options, needed, option
from acemerge.cli.text import adapter, outcome, print_json, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.output.merge_report import MergeReport


@command(
    "extract-lora",
    group="Checkpoints",
    takes=("base", "allow_pickle", "out", "overwrite", "device", *TELLING),
    examples=(
        "acemerge extract-lora ./math --base ./base --rank 16 -o ./math-lora",
        "acemerge extract-lora org/math --base org/base --rank 64 -o ./math-lora --device cuda",
    ),
    page="lora.md",
    helps={"base": "folder or Hub id (org/name@revision) that it comes from"},
)
def extract_lora(
    asked: Options,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of a full fine-tune")],
    rank: Annotated[int, option(OUTPUT, "rank of the adapter")],
) -> None:
    """Make a LoRA adapter of a full fine-tune, and say what of it is lost."""
    from acemerge import extract

    base = needed(asked.base, "--base", "name the model that it comes from with --base")
    out = needed(asked.out, "-o", "name the output folder with -o OUT")
    report = extract.extract_lora(model, base, rank, out, asked.run_options())
    if asked.as_json:
        print_json(outcome(report))
    elif not asked.quiet:
        show(stdout(), report)


def show(console: Console, report: MergeReport) -> None:
    """What each tensor lost, and what the adapter holds."""
    rows = [
        (name, f"{record['energy']:.4g}", f"{record['share_lost']:.2%}")
        for name, record in report.tensors.items()
        if record["energy"] or name in report.manifest["stored"]
    ]
    table(console, ("tensor", "energy of its difference", "lost"), rows)
    adapter(console, report)
