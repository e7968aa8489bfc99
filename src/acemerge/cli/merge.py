"""`acemerge merge`. It says before, what goes where and what it takes; after, what was done and what to look at."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acemerge.cli.command import command
from acemerge.cli.options import MERGING, Options
from acemerge.cli.text import adapter, cell, duration, is_live, outcome, print_json, say, size, stderr, stdout, table
from acemerge.cli.verify import verified
from acemerge.errors import addressed

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.engine.opening import Opened
    from acemerge.output.merge_report import MergeReport
    from acemerge.output.shares import Records
    from acemerge.planning.jobs import Job, Plan


@command(
    "merge",
    group="Merge",
    takes=MERGING,
    examples=(
        "acemerge merge --base ./base --expert ./math --expert ./code -o ./merged",
        "acemerge merge recipe.yaml --method ace -o ./merged --report",
    ),
    to_stores=True,
    page="recipes.md",
)
def merge(asked: Options) -> None:
    """Merge a base and its experts into one folder."""
    out = asked.output

    from acemerge import api
    from acemerge.cli.progress import progress
    from acemerge.engine.opening import open_recipe

    options = asked.run_options()
    opened = open_recipe(asked.asked_recipe(), out, options)  # downloads have a bar of their own
    foretold = not asked.silent and not asked.finish  # what takes long is done then
    if foretold:
        before(stderr(), opened, out, asked.resume, asked.ray)
    with progress(stderr(), asked.silent) as on_progress:
        report = api.run_opened(opened, out, options, on_progress)
    if asked.as_json:
        print_json(outcome(report))
    elif report.part is not None and not asked.quiet:
        after_part(stdout(), report)
    elif not asked.quiet:
        after(stdout(), report, opened.plan.warnings if is_live(stderr()) and foretold else ())


def before(console: Console, opened: Opened, out: Path, resumed: bool, cluster: str | None = None) -> None:
    """What goes where, and what to expect; on a terminal, while one may still stop it."""
    if not is_live(console):
        return
    from acemerge.checkpoints import files
    from acemerge.checkpoints.address import scheme_of
    from acemerge.engine.expected import expected_seconds
    from acemerge.planning.costs import resident

    plan = opened.plan if opened.part is None else _part_of(opened)
    table(console, ("rule", "tensors", "size", "what"), _rows(plan), numeric=("tensors", "size"))
    free, most = files.free_bytes(files.resolve(out)), resident(opened.plan) + opened.budget
    reads = size(plan.bytes_read + opened.plan.bytes_reread)
    facts = [
        ("experts", ", ".join(plan.experts)),
        *_parameters(plan),
        ("reads", f"{reads}, writes {size(plan.bytes_written)}{'' if free is None else f'; {size(free)} are free'}"),
    ]
    if opened.part is not None:
        own = opened.layout
        facts.append(
            ("part", f"{opened.part}: {len(own.jobs)} of the tensors, to {', '.join(name for name, _ in own.own)}")
        )
    facts.append(("memory", f"{size(most)} at most{', each task' if cluster else ''}"))
    if cluster is None:  # whose machines are not known yet
        seconds = duration(expected_seconds(opened, plan, out))
        remote = any(scheme_of(path) for model in opened.models for path in (out, *model.fingerprints))
        network = "; the network adds to it" if remote else ""
        facts.append(("time", f"about {seconds}{', less what is done already' if resumed else ''}{network}"))
    facts += [("warning", warning) for warning in plan.warnings]
    say(console, "")
    pairs(console, facts)
    say(console, "")


def _part_of(opened: Opened) -> Plan:
    """The plan with what the part does of it."""
    return dataclasses.replace(opened.plan, jobs=tuple(opened.layout.jobs), heads=tuple(() for _ in opened.plan.heads))


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    """For each rule: how many tensors, their bytes in the output, and what they are."""
    jobs: dict[str, list[Job]] = defaultdict(list)
    for job in plan.jobs:
        jobs[job.rule].append(job)
    rows: list[tuple[str, ...]] = []
    for rule, own in sorted(jobs.items(), key=lambda entry: -len(entry[1])):
        roles = Counter(job.role.name.replace("_", " ") for job in own)
        what = ", ".join(f"{count} {role}" for role, count in roles.most_common())
        rows.append((rule, f"{len(own)}", size(sum(spec.nbytes for job in own for spec in job.stored)), what))
    apart = [head.spec.nbytes for heads in plan.heads for head in heads]
    if apart:
        rows.append(("none", f"{len(apart)}", size(sum(apart)), "an expert's own, in heads/"))
    return rows


def _parameters(plan: Plan) -> list[tuple[str, str]]:
    """Every rule's parameters; of one that has different ones for different tensors, between which values."""
    from acemerge.methods.base import parameter_fields

    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for method in {id(job.method): job.method for job in plan.ruled}.values():
        for key in parameter_fields(method):
            value, known = getattr(method, key.name), found[method.name][key.name]
            if value not in known:  # a list may be one
                known.append(value)
    return [
        (rule, ", ".join(f"{key} {_values(values)}" for key, values in parameters.items()))
        for rule, parameters in sorted(found.items())
    ]


def _values(known: Sequence[Any]) -> str:
    from acemerge.methods import Method

    if len(known) == 1:
        return known[0].name if isinstance(known[0], Method) else f"{known[0]}"
    if all(isinstance(value, int | float) for value in known):
        return f"{min(known)} to {max(known)}"
    return "several"


def after(console: Console, report: MergeReport, warned: Sequence[str] = ()) -> None:
    """What was done, and the three things to look at: experts, layers, what to do next. `warned`: the warnings that
    were said before the merge.
    """
    from acemerge.inspection.advice import largest_update, of_energies, weights_of
    from acemerge.output.length import length_of
    from acemerge.output.shares import total_energies

    manifest = report.manifest
    if report.was_complete and report.out is not None:
        say(console, f"{verified(report.out, manifest)}: the merge was complete, nothing was left to do")
        return
    rules = ", ".join(f"{count} by {rule}" for rule, count in report.rules.items())
    say(console, f"merged {len(report.tensors)} tensors ({rules}) in {manifest['seconds']:.1f} s")
    for label, about in manifest.get("adapters", {}).items():
        say(console, f"expert {label}: {about}")
    for who, about in manifest.get("dequantized", {}).items():
        say(console, f"{who}: dequantised, {about}")
    for warning in manifest["warnings"]:
        if warning not in warned:
            say(console, f"warning: {warning}", wrap=True)
    if "stored" in manifest:
        adapter(console, report)
    say(console, f"{report.out}: {size(report.bytes_written)}, manifest in acemerge.json")
    if report.pushed:
        say(console, f"uploaded to {report.pushed}")
    labels = manifest["experts"]
    records = report.records
    energies = total_energies(labels, records)
    advice = [str(advice) for advice in of_energies(labels, energies, weights_of(manifest["recipe"], len(labels)))]
    experts = [line for line in advice if line not in manifest["warnings"]] or [largest_update(labels, energies)]
    length = length_of(labels, records)
    far = [] if length is None else [("length", str(length))]
    looked = [("experts", "; ".join(experts)), *far, ("layers", "; ".join(_layers(records)))]
    pairs(console, [*looked, *next_steps(report)])


def after_part(console: Console, report: MergeReport) -> None:
    """What a part did, and what is next."""
    files = ", ".join(report.manifest["outputs"])
    done = "was done" if report.was_complete else f"took {report.manifest['seconds']:.1f} s"
    say(console, f"part {report.part} {done}: {len(report.tensors)} tensors in {files}")
    pairs(console, [("next", f"the same with --finish instead of --shard, when all parts of {report.out} are done")])


def _layers(records: Records) -> list[str]:
    """What was unusual, and where ACE's system was hardest to solve and its experts most unlike in size."""
    from acemerge.inspection.advice import of_statuses

    found = [str(advice) for advice in of_statuses(record.stats.statuses for record in records.values())]
    layers = {name: record.stats for name, record in records.items() if record.is_layer}
    conditions = {name: stats.largest(lambda part: part.condition) for name, stats in layers.items()}
    gammas = {name: stats.largest(lambda part: part.gamma) for name, stats in layers.items()}
    for figures, text in ((conditions, "worst condition"), (gammas, "most uneven experts: gamma")):
        known = {name: value for name, value in figures.items() if value is not None}
        if known:
            name = max(known, key=lambda n: known[n])
            found.append(f"{text} {known[name]:.3g} in {name}")
    return found or ["nothing unusual"]


def next_steps(report: MergeReport) -> list[tuple[str, str]]:
    """How to load the output, to score it and to look at it."""
    from acemerge.checkpoints import files
    from acemerge.checkpoints.address import scheme_of
    from acemerge.checkpoints.config import CONFIG, read_config
    from acemerge.output.loading import load_call
    from acemerge.output.names import CARD, REPORT

    assert report.out is not None
    outputs, out = report.manifest["outputs"], shlex.quote(addressed(report.out))
    config = read_config(files.resolve(report.out) / CONFIG) if CONFIG in outputs else {}
    call = load_call(config, outputs, addressed(report.out), "stored" in report.manifest)
    page = report.out / REPORT
    load = f"{call}; {CARD} there has it whole" if call else f"as {report.out / CARD} says"
    look = f"open {page}" if files.kind(page) == "file" else f"acemerge report {out}"
    if scheme_of(report.out):  # transformers reads folders, and browsers files
        load = f"acemerge convert {out} FOLDER, then as {report.out / CARD} says"
        look = f"acemerge report {out} -o {REPORT}, then open {REPORT}"
    return [
        ("load", load),
        ("score", f"acemerge evaluate {out} --tasks tasks.yaml"),
        ("look", look),
    ]


def pairs(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Labels and texts; on a terminal long ones go on below their beginning, elsewhere each is one line."""
    if not console.is_terminal:
        for label, text in facts:
            say(console, f"{label}: {text}")
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(cell(label), cell(text))
    console.print(grid)
