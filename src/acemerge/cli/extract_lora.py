"""`acemerge extract-lora`: an adapter out of a full fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.grouping import grouped, shortened
from acemerge.cli.options import OUTPUT, TELLING, Options, needed, option
from acemerge.cli.text import adapter, outcome, print_json, say, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.output.merge_report import MergeReport


@command(
    "extract-lora",
    group="Checkpoints",
    takes=("base", "allow_pickle", "out", "overwrite", "device", "every", *TELLING),
    examples=(
        "acemerge extract-lora ./math --base ./base --rank 16 -o ./math-lora",
        "acemerge extract-lora org/math --base org/base --rank 64 -o ./math-lora --device cuda",
    ),
    to_stores=True,
    page="lora.md",
    helps={"base": "folder, Hub id (org/name@revision) or address that it comes from"},
)
def extract_lora(
    asked: Options,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, Hub id or address of a full fine-tune")],
    rank: Annotated[int, option(OUTPUT, "rank of the adapter")],
) -> None:
    """Make a LoRA adapter of a full fine-tune, and say what of it is lost."""
    base = needed(asked.base, "--base", "name the model that it comes from with --base")
    out = asked.output

    from acemerge import extract

    report = extract.extract_lora(model, base, rank, out, asked.run_options())
    if asked.as_json:
        print_json(outcome(report))
    elif not asked.quiet:
        show(stdout(), report, asked.every)


def show(console: Console, report: MergeReport, every: bool = False) -> None:
    """What tensors lost, layers together, and what the adapter holds."""
    records, stored = report.records, report.manifest["stored"]
    names = [name for name, record in records.items() if record.energy or name in stored]
    say(console, f"{'':5} {'energy':>10} {'lost':>8}  tensor")
    for common, members in grouped(names, lambda name: name in stored, every):
        energy = sum(records[name].energy or 0.0 for name in members)
        lost = sum((records[name].energy or 0.0) * (records[name].share_lost or 0.0) for name in members)
        figures = f"{len(members):5} {energy:10.4g} {lost / energy if energy else 0:8.2%}"
        say(console, f"{figures}  {shortened(common, console.width - len(figures) - 2)}")
    say(console, "energy: squared norm of the difference; lost: the share of it that the adapter lacks", wrap=True)
    adapter(console, report)
