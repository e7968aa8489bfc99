"""`acemerge plan`: what a merge would do."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from acemerge.cli.command import command
from acemerge.cli.grouping import grouped, shortened
from acemerge.cli.options import MERGING, Options
from acemerge.cli.text import print_json, say, size, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.planning.jobs import Plan


@command(
    "plan",
    group="Merge",
    takes=(*MERGING, "every"),
    examples=(
        "acemerge plan --base ./base --expert ./math --expert ./code",
        "acemerge plan recipe.yaml --method ties -o ./merged",
    ),
    to_stores=True,
    page="concepts/policies.md",
)
def plan(asked: Options) -> None:
    """Show which tensors get which rule and why, and what the merge takes; reads headers, and samples of weights."""
    from acemerge.engine.opening import open_recipe
    from acemerge.engine.relatedness import check_related

    options = dataclasses.replace(asked.run_options(), stream=True)  # to read headers, nothing is downloaded
    opened = open_recipe(asked.asked_recipe(), asked.out, options)
    if not asked.force:
        check_related(opened.plan, opened.base, opened.experts)
    if asked.as_json:
        print_json(as_table(opened.plan))
    elif not asked.quiet:
        show(stdout(), opened.plan, asked.every)


def as_table(plan: Plan) -> dict[str, Any]:
    """All of it, as JSON."""
    from acemerge.engine.foreseen import expected_memory
    from acemerge.planning.costs import operations

    named = zip(plan.experts, plan.heads, strict=True)
    tensors = [
        {
            "name": job.name,
            "shape": list(job.spec.shape),
            "role": job.role.name,
            "rule": job.rule,
            "reason": job.reason,
        }
        for job in plan.jobs
    ]
    return {
        "experts": list(plan.experts),
        "tensors": tensors,
        "heads": {label: [head.spec.name for head in heads] for label, heads in named},
        "roles": plan.roles_source,
        "warnings": list(plan.warnings),
        "bytes_read": plan.bytes_read + plan.bytes_reread,
        "bytes_written": plan.bytes_written,
        "operations": operations(plan),
        "peak_memory": expected_memory(plan),
    }


def show(console: Console, plan: Plan, every: bool = False) -> None:
    """What gets which rule and why, layers together; what else is to be known; what it takes."""
    from acemerge.engine.foreseen import expected_memory
    from acemerge.planning.costs import operations

    _show_tensors(console, plan, every)
    for label, heads in zip(plan.experts, plan.heads, strict=True):
        for head in heads:
            say(console, f"heads/{label}: {head.spec.name} ({head.reason})", wrap=True)
    say(console, f"roles from {plan.roles_source}", wrap=True)
    for label, adapter in plan.adapters.items():
        say(console, f"expert {label}: {adapter}", wrap=True)
    for who, about in plan.dequantized.items():
        say(console, f"{who}: to be dequantised, {about}", wrap=True)
    for label, tasks in plan.calibration.items():
        say(console, f"expert {label}: to be calibrated on {', '.join(tasks)}", wrap=True)
    for warning in plan.warnings:
        say(console, f"warning: {warning}", wrap=True)
    read = size(plan.bytes_read + plan.bytes_reread)
    takes = (
        f"{len(plan.jobs)} tensors; read {read}, write {size(plan.bytes_written)}; "
        f"{operations(plan) / 1e9:,.1f} GFLOP; peak memory about {size(expected_memory(plan))}"
    )
    say(console, takes, wrap=True)


def _show_tensors(console: Console, plan: Plan, every: bool) -> None:
    """Under each rule and reason the tensors that it holds for: how many, their names, their shape."""
    jobs = {job.name: job for job in plan.jobs}
    parts: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for job in plan.jobs:
        parts[job.rule, job.role.name, job.reason].append(job.name)
    for (rule, role, reason), names in sorted(parts.items(), key=lambda part: -len(part[1])):
        say(console, f"{rule} ({role.replace('_', ' ')}): {reason}", wrap=True)
        rows = [
            (f"{len(members)}", common, "x".join(map(str, jobs[members[0]].spec.shape)) or "one value")
            for common, members in grouped(names, lambda name: jobs[name].spec.shape, every)
        ]
        width = console.width - 6 - max(len(shape) for _, _, shape in rows) - 2
        longest = min(width, max(len(common) for _, common, _ in rows))
        for count, common, shape in rows:
            say(console, f"{count:>5} {shortened(common, width):{longest}}  {shape}")
        say(console, "")
