"""What the page shows of inspections, plans and merges, as HTML. All text from files and people is escaped."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from acemerge.cli.merge import next_steps
from acemerge.cli.text import size
from acemerge.engine.foreseen import expected_memory
from acemerge.errors import printable
from acemerge.inspection.survey import Inspection, number
from acemerge.output.shares import total_energies
from acemerge.planning.costs import operations
from acemerge.planning.jobs import Plan
from acemerge.ui.folders import Listing
from acemerge.ui.runner import State
from acemerge.ui.steps import Merged

_MOST_LAYERS = 10


def escape(text: str) -> str:
    """Text as HTML. What no one could see, and half a character, which no page may hold, is spelt out."""
    return html.escape(printable(text))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[str] = ()) -> str:
    """A table whose first column names its rows."""
    heads = "".join(f'<th scope="col"{_right(c in numeric)}>{escape(c)}</th>' for c in columns)
    body = "".join(f"<tr>{_row(row, columns, numeric)}</tr>" for row in rows)
    title = f"<caption><span>{escape(caption)}</span></caption>"
    return f'<div class="scroll"><table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Sequence[object], columns: Sequence[str], numeric: Sequence[str]) -> str:
    first, *others = row
    cells = (f"<td{_right(c in numeric)}>{escape(str(x))}</td>" for c, x in zip(columns[1:], others, strict=True))
    return f'<th scope="row">{escape(str(first))}</th>{"".join(cells)}'


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


REPLACE = "Replace what the output folder holds"
FORCE = "Merge experts even if they do not seem to come from this base"
_BOXES = {"add --overwrite": f"tick “{REPLACE}”", "with --overwrite": f"with “{REPLACE}” ticked"}
_BOXES |= {"with --force": f"with “{FORCE}” ticked"}


# Of what only a recipe file has: `assets: base`, the recipe's rules.
_OF_RECIPES = re.compile(r"`\w+: |\brecipe('s)? rules?\b")


def plain(text: str) -> str:
    """Advice without a command line's signs. What the page has goes by its own name: a box, a field of the rule; of
    what it has not, it is said where it is.
    """
    in_recipe = _OF_RECIPES.search(text)
    for option, box in _BOXES.items():
        text = text.replace(option, box)
    text = re.sub(r"--set (\w+)=", r"\1 = ", text.replace("`", ""))
    text = re.sub(r"--scale (?=[\d.])", "a scale of ", text).replace("--scale", "scale")
    text = re.sub(r"--method (\w+)", r"the rule \1", text).replace("the rule auto", "the recommended rule")
    named, options = re.subn(r"(?<![\w-])--(?=[a-z])", "", text)
    if options:
        return f"{named} (on the command line)"
    return f"{named} (in a recipe file, on the command line)" if in_recipe else named


def failure(line: str) -> str:
    """An error as one line."""
    return f'<p class="failure" role="alert">{escape(plain(line))}</p>'


def _warnings(lines: Sequence[tuple[str, str]]) -> str:
    """Warnings with their cures, which may be empty."""
    said = ((escape(plain(what)), escape(plain(cure))) for what, cure in lines)
    items = (f"<li><strong>{what}</strong>{f'<br>{cure}' if cure else ''}</li>" for what, cure in said)
    return f'<ul class="advice">{"".join(items)}</ul>' if lines else ""


def listing(found: Listing) -> str:
    """How many checkpoints there are, and what was passed over."""
    count = len(found.found)
    text = f"{count} checkpoint{'' if count == 1 else 's'} found" if count else "No checkpoints with safetensors found"
    lines = "".join(f"<li>{escape(plain(line))}</li>" for line in found.passed_over)
    more = (
        f"<details><summary>{len(found.passed_over)} passed over</summary><ul>{lines}</ul></details>" if lines else ""
    )
    return f"<p>{text}.</p>{more}"


def inspection(seen: Inspection) -> str:
    """Warnings first, then the experts, how alike they are, and the layers in conflict."""
    facts = seen.table()
    layers = [view for view in seen.views if view.squared_norms is not None]
    leads = Counter(view.leader(seen.experts) for view in layers)
    columns = ("expert", "share", "leads layers", "distance", "stable rank")
    rows = [
        (
            expert["name"],
            f"{expert['share']:.1%}",
            f"{leads[expert['name']]} of {len(layers)}",
            _number(expert["distance"], "{:.2%}"),
            _number(expert["stable_rank"], "{:.1f}"),
        )
        for expert in facts["experts"]
    ]
    warnings = [(entry["what"], entry["cure"]) for entry in facts["warnings"]]
    parts = [_warnings(warnings) or '<p class="good">No warnings.</p>']
    parts.append(table("The experts", columns, rows, numeric=columns[1:]))
    if len(seen.experts) > 1:
        cosines = ((e["name"], *(_number(c, "{:.2f}") for c in e["cosines"].values())) for e in facts["experts"])
        parts.append(table("Cosine between their updates", ("", *seen.experts), cosines, numeric=seen.experts))
        parts.append(_conflicts(seen))
        parts.append(_farthest(seen))
    parts.append(f'<p class="note">{_HELP}</p>')
    return "".join(parts)


_HELP = (
    "Share: of the squared updates of all experts. Distance: the update's norm over the base's. Stable rank: how many "
    "directions the update of the median layer has. Cosine: 1 the same direction, 0 nothing in common, below 0 they "
    "pull against each other. Cancelled: magnitude lost when the updates are added. Beside right angles: the length of "
    "their sum, 1 where they have nothing in common."
)


def _conflicts(seen: Inspection) -> str:
    worst = seen.in_conflict[:_MOST_LAYERS]
    rows = [
        (
            view.job.name,
            f"{view.sums.cancelled:.0%}",
            *view.lowest_cosine(seen.experts),
            view.leader(seen.experts) or "-",
        )
        for view in worst
    ]
    columns = ("layer", "cancelled", "lowest cosine", "between", "largest update")
    unrelated = 1 - len(seen.experts) ** -0.5
    caption = f"Layers in conflict, the worst {len(worst)}; updates that have nothing in common lose {unrelated:.0%}"
    return table(caption, columns, rows, numeric=columns[1:3]) if rows else ""


def _farthest(seen: Inspection) -> str:
    rows = [
        (
            view.job.name,
            _number(number(view.sums.added_beside_base), "{:.2%}"),
            _number(number(view.sums.added_beside_orthogonal), "{:.2f}"),
            view.leader(seen.experts) or "-",
        )
        for view in seen.farthest[:_MOST_LAYERS]
    ]
    columns = ("layer", "of its weights", "beside right angles", "largest update")
    caption = f"Layers that the updates move furthest when they are added, the first {len(rows)}"
    return table(caption, columns, rows, numeric=columns[1:3]) if rows else ""


def plan(found: Plan) -> str:
    """What gets which rule and why, tensors of a kind together, and what it will take."""
    kinds = Counter((job.role.name, job.rule, job.reason) for job in found.jobs)
    first = {(job.role.name, job.rule, job.reason): job.name for job in reversed(found.jobs)}
    rows = [(role, rule, count, why, first[role, rule, why]) for (role, rule, why), count in kinds.most_common()]
    columns = ("kind", "rule", "tensors", "why", "the first of them")
    heads = sum(len(expert) for expert in found.heads)
    beside = f" {heads} task head{'' if heads == 1 else 's'} will be kept in <code>heads/</code>." if heads else ""
    takes = (
        f"{len(found.jobs):,} tensors: {size(found.bytes_read + found.bytes_reread)} to read, "
        f"{size(found.bytes_written)} to write, {operations(found) / 1e9:,.1f} GFLOP, "
        f"peak memory about {size(expected_memory(found))}."
    )
    warnings = _warnings([(warning, "") for warning in found.warnings])
    return f"<p>{takes}{beside}</p>{warnings}{table('What gets which rule', columns, rows, numeric=('tensors',))}"


def running(state: State) -> str:
    """How far the work is."""
    progress = state.progress
    if state.phase == "stopping":
        about = "Stopping after the present tensor"
    elif progress is None:
        about = "Opening the checkpoints"
    else:
        about = f"{_STAGES.get(progress.stage, progress.stage)}: tensor {progress.done:,} of {progress.total:,}"
    value = "" if progress is None else f' value="{progress.bytes_done}" max="{max(progress.bytes_total, 1)}"'
    bar = f'<progress aria-label="{escape(about)}"{value}></progress>'
    return f'<div class="running"><p>{escape(about)}{_pace(state)}</p>{bar}{_present(state)}</div>'


_STAGES = {"inspect": "Looking", "thresholds": "Finding thresholds", "merge": "Merging", "report": "Writing the report"}


def _pace(state: State) -> str:
    done = state.progress.bytes_done if state.progress else 0
    if not done or state.seconds <= 0 or state.phase == "stopping":
        return ""
    assert state.progress is not None
    rate = done / state.seconds
    return f", {size(rate)}/s, {(state.progress.bytes_total - done) / rate:.0f} s left"


def _present(state: State) -> str:
    return f'<p class="note">{escape(state.progress.name)}</p>' if state.progress else ""


def stopped(what: str) -> str:
    """Work that was ended on demand."""
    kept = " Nothing of it was kept." if what == "merge" else ""
    return f'<p class="note">Stopped.{kept}</p>'


def merged(done: Merged, number: int) -> str:
    """The summary of a merge, and a link to its report."""
    manifest, records = done.report.manifest, done.report.records
    total = sum(entry["bytes"] for entry in manifest["outputs"].values())
    rules = Counter(record.rule for record in records.values())
    by = ", ".join(f"{count} by {rule}" for rule, count in rules.most_common())
    energies = total_energies(manifest["experts"], records)
    largest = max(range(len(energies)), key=lambda t: energies[t])
    share = f"{manifest['experts'][largest]}, with {energies[largest] / sum(energies):.0%}" if sum(energies) else "none"
    link = f'<a class="report" href="report/{number}" target="_blank" rel="noopener">Open the report</a>'
    return (
        f'<div class="done"><p><strong>Merged into <code>{escape(done.name)}</code></strong></p>'
        f"<p>{len(records):,} tensors ({escape(by)}), {size(total)}, in {manifest['seconds']:.1f} s. "
        f"Largest update: {escape(share)} of the energy.</p>"
        f"{_warnings([(warning, '') for warning in manifest['warnings']])}"
        f"<p>{link if done.page else 'The report was not finished.'}</p>{_next(done)}</div>"
    )


def _next(done: Merged) -> str:
    """How to load the output and to score it."""
    said = {"load": "Load it in Python", "score": "Score it in a terminal"}
    steps = ((said[what], text) for what, text in next_steps(done.report) if what in said)
    return "".join(f"<p>{title}{_call(text)}</p>" for title, text in steps)


def _call(text: str) -> str:
    """What is to be typed, or a sentence's end where there is no such thing."""
    return f" {escape(text)}." if text.startswith("as ") else f": <code>{escape(text)}</code>"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def roots(paths: Sequence[Path]) -> str:
    """Where models are looked for."""
    names = ", ".join(f"<code>{escape(str(path))}</code>" for path in paths)
    return f"<p>Models in {names}, on this machine alone: nothing is sent anywhere.</p>"


def about(text: str, source: str) -> str:
    """A rule in a sentence, and where it is from."""
    return f'<p class="note">{escape(plain(text))} <cite>Source: {escape(source)}</cite></p>'


def state(found: State) -> str:
    """Where the work stands, whatever it is."""
    if found.is_busy:
        return running(found)
    if found.phase == "failed":
        return failure(found.error)
    if found.phase == "stopped":
        return stopped(found.what)
    if found.what == "merge":
        return merged(found.result, found.number)
    return inspection(found.result) if found.what == "inspect" else plan(found.result)
