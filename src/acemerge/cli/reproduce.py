"""`acemerge reproduce`: the papers' experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli import evaluate
from acemerge.cli.command import command
from acemerge.cli.options import READING, RULE, SAYING, Options, needed, option
from acemerge.cli.text import say, size, stderr, stdout, table
from acemerge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.reproduction.inputs import PackInput


@command(
    "reproduce",
    group="More",
    takes=("allow_pickle", "out", "overwrite", "device", "quiet"),
    examples=("acemerge reproduce gpt2 --dry-run", "acemerge reproduce vit --size b32 --methods ace,average -o ./vit"),
    page="reproduce.md",
    helps={"out": "folder for merges, scores and tables"},
)
def reproduce(
    asked: Options,
    pack: Annotated[str, typer.Argument(metavar="vit|roberta|gpt2|llama", help="which of the papers' experiments")],
    variant: Annotated[
        str | None, option(READING, "which model, where a pack has several [vit: b16]", "--size")
    ] = None,
    methods: Annotated[str | None, option(RULE, "some of the pack's rules, as ace,average")] = None,
    tasks: Annotated[str | None, option(READING, "score some of the pack's tasks only, as cola,rte")] = None,
    limit: Annotated[int | None, option(READING, "score at most so many examples of each task", min=1)] = None,
    dry_run: Annotated[bool, option(SAYING, "show what would be fetched, and stop", "--dry-run")] = False,
    yes: Annotated[bool, option(SAYING, "fetch without asking", "--yes")] = False,
) -> None:
    """Run one of the papers' experiments with its own models and data: our scores beside the published ones."""
    from acemerge.reproduction.comparison import cells
    from acemerge.reproduction.inputs import find_inputs
    from acemerge.reproduction.pack import chosen_of, load_pack
    from acemerge.reproduction.reproduce import TABLE, Asked
    from acemerge.reproduction.reproduce import reproduce as run

    found = load_pack(pack, variant)
    rules = chosen_of(list(found.rules), methods, "methods")
    subset = Asked(found, rules, chosen_of(found.task_names, tasks, "tasks"), limit)
    if not dry_run:
        needed(asked.out, "-o", "name the output folder with -o OUT")
    inputs = find_inputs(found, subset.tasks, asked.out, asked.allow_pickle)
    missing = sum(entry.to_fetch() for entry in inputs)
    if dry_run or not asked.quiet:
        _list(stdout(), found.title, inputs, missing)
    if asked.out is None or dry_run:
        return
    if missing and not yes and not _may_fetch(stderr(), missing):
        say(stderr(), "nothing was fetched")
        return
    with evaluate.examples_progress(stderr(), asked.quiet) as on_progress:
        result = run(subset, inputs, asked.out, asked.run_options(), _tell(asked), on_progress)
    if not asked.quiet:
        if subset.subset:
            say(stdout(), f"A subset: {subset.subset}.")
        header, lines = cells(result.lines)
        if lines:
            table(stdout(), header, lines, numeric=("published", "ours", "difference"))
        evaluate.show(stdout(), result.evaluation, asked.out, result.missing)
        say(stdout(), f"{asked.out / TABLE}: published beside ours, with all sources and inputs")


def _tell(asked: Options) -> Callable[[str], None]:
    return lambda text: None if asked.quiet else say(stderr(), text)


def _list(console: Console, title: str, inputs: Sequence[PackInput], missing: int) -> None:
    rows = [[entry.name, size(entry.nbytes), size(entry.to_fetch())] for entry in inputs]
    say(console, f"{title}: {len(inputs)} inputs, {size(missing)} to fetch into the cache of huggingface_hub")
    table(console, ("from the Hub", "size", "to fetch"), rows, numeric=("size", "to fetch"))


def _may_fetch(console: Console, missing: int) -> bool:
    if not console.is_terminal:
        raise UsageError("command line", f"{size(missing)} would be fetched", "add --yes if they may be")
    return typer.confirm(f"Fetch {size(missing)}?", err=True)
