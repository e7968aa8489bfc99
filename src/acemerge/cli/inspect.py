"""`acemerge inspect`: a look at the experts before they are merged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import typer
from rich.console import Console

from acemerge.cli.options import (
    AllowPickle,
    Base,
    ComputeDtype,
    Debug,
    Dequantize,
    Device,
    Experts,
    MaxMemory,
    MethodName,
    Nonfinite,
    PolicyOption,
    Quiet,
    RecipeFile,
    Settings,
    VocabularyOption,
    Workers,
    asked_recipe,
)
from acemerge.cli.progress import progress
from acemerge.cli.text import say, table
from acemerge.engine.opening import RunOptions, open_recipe
from acemerge.inspection.survey import Inspection, View, numbers, survey

Json = Annotated[bool, typer.Option("--json", help="print everything as JSON, every layer included")]


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command()
    def inspect(
        recipe: RecipeFile = None,
        base: Base = None,
        expert: Experts = None,
        method: MethodName = None,
        settings: Settings = None,
        policy: PolicyOption = None,
        device: Device = "cpu",
        compute_dtype: ComputeDtype = None,
        workers: Workers = 1,
        max_memory: MaxMemory = None,
        allow_pickle: AllowPickle = False,
        dequantize: Dequantize = False,
        vocabulary: VocabularyOption = None,
        nonfinite: Nonfinite = None,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Look at the experts before merging: how far, how alike, where in conflict. Reads every tensor once."""
        keys = {
            "base": base,
            "experts": expert,
            "policy": policy,
            "compute_dtype": compute_dtype,
            "vocabulary": vocabulary,
            "nonfinite": nonfinite,
        }
        options = RunOptions(
            device,
            workers=workers,
            max_memory=max_memory,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            quiet=quiet,
        )
        opened = open_recipe(asked_recipe(recipe, keys, method, settings, allow_pickle), None, options)
        with progress(err_console, quiet) as on_progress:
            seen = survey(opened, workers, on_progress)
        if as_json:
            out_console.file.write(json.dumps(seen.table(), allow_nan=False) + "\n")
        elif not quiet:
            show(out_console, seen)


_MOST_LAYERS = 10


def show(console: Console, seen: Inspection) -> None:
    """The experts, how alike they are, the layers in conflict, and the warnings with their cures."""
    layers = [view for view in seen.views if view.squared_norms is not None]
    leads = Counter(_leader(seen.experts, view) for view in layers)
    total = seen.total
    rows = zip(
        seen.experts,
        (f"{energy:.4g}" for energy in total.energies.tolist()),
        (f"{share:.1%}" for share in total.shares.tolist()),
        (f"{leads[label]} of {len(layers)}" for label in seen.experts),
        (_number(distance, "{:.2%}") for distance in numbers(total.distances)),
        (_number(rank, "{:.1f}") for rank in seen.stable_ranks),
        strict=True,
    )
    columns = ("expert", "energy", "share", "leads layers", "distance", "stable rank")
    table(console, columns, rows, numeric=columns[1:])
    if len(seen.experts) > 1:
        say(console, "\ncosine between the experts, over all tensors")
        cosines = [[_number(value, "{:.2f}") for value in numbers(row)] for row in total.cosines]
        names = [f"{i}" for i in range(1, len(seen.experts) + 1)]
        rows_of = ([n, label, *row] for n, label, row in zip(names, seen.experts, cosines, strict=True))
        table(console, ("", "expert", *names), rows_of, numeric=names)
        _conflicts(console, seen)
    _reading_help(console)
    for name in seen.passed_over:
        say(console, f"passed over: {name}, whose rows are matched by token")
    for advice in seen.advice:
        say(console, f"warning: {advice}")
    if not seen.advice:
        say(console, "no warnings")


def _conflicts(console: Console, seen: Inspection) -> None:
    worst = seen.in_conflict[:_MOST_LAYERS]
    if not worst:
        return
    unrelated = 1 - len(seen.experts) ** -0.5
    say(console, f"\nlayers in conflict, the worst {len(worst)} of {len(seen.in_conflict)}")
    say(console, f"updates of one size that have nothing to do with each other lose {unrelated:.0%}")
    rows = [
        (
            view.job.name,
            f"{view.sums.cancelled:.0%}",
            *_lowest(seen.experts, view),
            _number(view.gamma, "{:.3g}"),
            _leader(seen.experts, view),
        )
        for view in worst
    ]
    columns = ("layer", "cancelled", "lowest cosine", "between", "gamma", "largest update")
    table(console, columns, rows, numeric=("cancelled", "lowest cosine", "gamma"))


def _reading_help(console: Console) -> None:
    say(
        console,
        "\nenergy: squared norm of the update; distance: its norm over the base's; stable rank: energy over the",
    )
    say(
        console,
        "squared largest singular value, the median layer; cancelled: magnitude lost when the updates are added",
    )


def _lowest(labels: Sequence[str], view: View) -> tuple[str, str]:
    """The lowest cosine between two experts, and their names."""
    cosines = view.sums.cosines
    pairs = [(float(cosines[s, t]), s, t) for s, t in combinations(range(len(labels)), 2)]
    found = [pair for pair in pairs if pair[0] == pair[0]]
    if not found:
        return "-", "-"
    lowest, s, t = min(found)
    return f"{lowest:.2f}", f"{labels[s]}, {labels[t]}"


def _leader(labels: Sequence[str], view: View) -> str:
    """The expert with the largest update."""
    n = view.sums.energies
    return f"{labels[int(n.argmax())]}" if n.any() else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
