"""`acemerge inspect`: a look at the experts before they are merged."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from acemerge.cli.command import command
from acemerge.cli.options import LOOKING, TELLING, Options
from acemerge.cli.text import print_json, say, stderr, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.inspection.survey import Inspection

_MOST_LAYERS = 10
_FARTHEST_LAYERS = 5


@command(
    "inspect",
    group="Merge",
    takes=(*LOOKING, *TELLING),
    examples=(
        "acemerge inspect --base ./base --expert ./math --expert ./code",
        "acemerge inspect recipe.yaml --json",
    ),
    page="quick-start.md",
)
def inspect(asked: Options) -> None:
    """Look at the experts before merging: how far, how alike, where in conflict. Reads every tensor once."""
    from acemerge.cli.progress import progress
    from acemerge.engine.opening import open_recipe
    from acemerge.inspection.survey import survey

    opened = open_recipe(asked.asked_recipe(), None, asked.run_options())
    with progress(stderr(), asked.silent) as on_progress:
        seen = survey(opened, asked.workers, on_progress)
    if asked.as_json:
        print_json(seen.table())
    elif not asked.quiet:
        show(stdout(), seen)


def show(console: Console, seen: Inspection) -> None:
    """The experts, how alike they are, the layers in conflict, and the warnings with their cures."""
    from acemerge.inspection.survey import numbers

    layers = [view for view in seen.views if view.squared_norms is not None]
    leads = Counter(view.leader(seen.experts) for view in layers)
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
        say(console, "")
        say(console, "cosine between the experts, over all tensors")
        cosines = [[_number(value, "{:.2f}") for value in numbers(row)] for row in total.cosines]
        names = [f"{i}" for i in range(1, len(seen.experts) + 1)]
        rows_of = ([n, label, *row] for n, label, row in zip(names, seen.experts, cosines, strict=True))
        table(console, ("", "expert", *names), rows_of, numeric=names)
        _conflicts(console, seen)
        _farthest(console, seen)
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
    say(console, "")
    say(console, f"layers in conflict, the worst {len(worst)} of {len(seen.in_conflict)}")
    say(console, f"updates that have nothing to do with each other, all of one length, lose {unrelated:.0%}")
    rows = [
        (
            view.job.name,
            f"{view.sums.cancelled:.0%}",
            *view.lowest_cosine(seen.experts),
            _number(view.gamma, "{:.3g}"),
            view.leader(seen.experts) or "-",
        )
        for view in worst
    ]
    columns = ("layer", "cancelled", "lowest cosine", "between", "gamma", "largest update")
    table(console, columns, rows, numeric=("cancelled", "lowest cosine", "gamma"))


def _farthest(console: Console, seen: Inspection) -> None:
    from acemerge.inspection.survey import number

    worst = seen.farthest[:_FARTHEST_LAYERS]
    if not worst:
        return
    say(console, "")
    say(console, f"layers that the updates move furthest when they are added, the first {len(worst)}")
    rows = [
        (
            view.job.name,
            _number(number(view.sums.added_beside_base), "{:.2%}"),
            _number(number(view.sums.added_beside_orthogonal), "{:.2f}"),
            view.leader(seen.experts) or "-",
        )
        for view in worst
    ]
    columns = ("layer", "of its weights", "beside right angles", "largest update")
    table(console, columns, rows, numeric=columns[1:3])


def _reading_help(console: Console) -> None:
    say(console, "")
    say(
        console,
        "energy: squared norm of the update; distance: its norm over the base's; stable rank: energy over the",
    )
    say(
        console,
        "squared largest singular value, the median layer; cancelled: magnitude lost when the updates are added;",
    )
    say(console, "beside right angles: the length of their sum, 1 where they have nothing to do with each other")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
