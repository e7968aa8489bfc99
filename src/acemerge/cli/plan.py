"""`acemerge plan`: what a merge would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acemerge.cli.command import command
from acemerge.cli.options import MERGING, Options
from acemerge.cli.text import print_json, say, size, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.planning.jobs import Plan


@command(
    "plan",
    group="Merge",
    takes=MERGING,
    examples=(
        "acemerge plan --base ./base --expert ./math --expert ./code",
        "acemerge plan recipe.yaml --method ties -o ./merged",
    ),
    page="concepts/policies.md",
)
def plan(asked: Options) -> None:
    """Show every tensor, its role, its rule and why; reads headers only."""
    from acemerge.engine.opening import open_recipe

    opened = open_recipe(asked.asked_recipe(), asked.out, asked.run_options())
    if asked.as_json:
        print_json(as_table(opened.plan))
    elif not asked.quiet:
        show(stdout(), opened.plan)


def as_table(plan: Plan) -> dict[str, Any]:
    """All of it, as JSON."""
    from acemerge.planning.costs import operations, peak_memory

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
        "peak_memory": peak_memory(plan),
    }


def show(console: Console, plan: Plan) -> None:
    from acemerge.planning.costs import operations, peak_memory

    rows = [(job.name, "x".join(map(str, job.spec.shape)), job.role.name, job.rule, job.reason) for job in plan.jobs]
    table(console, ("tensor", "shape", "role", "rule", "why"), rows)
    for label, heads in zip(plan.experts, plan.heads, strict=True):
        for head in heads:
            say(console, f"heads/{label}: {head.spec.name} ({head.reason})")
    say(console, f"\nroles from {plan.roles_source}")
    for label, adapter in plan.adapters.items():
        say(console, f"expert {label}: {adapter}")
    for who, about in plan.dequantized.items():
        say(console, f"{who}: to be dequantised, {about}")
    for label, tasks in plan.calibration.items():
        say(console, f"expert {label}: to be calibrated on {', '.join(tasks)}")
    for warning in plan.warnings:
        say(console, f"warning: {warning}")
    read = size(plan.bytes_read + plan.bytes_reread)
    say(
        console,
        f"{len(plan.jobs)} tensors; read {read}, write {size(plan.bytes_written)}; "
        f"{operations(plan) / 1e9:,.1f} GFLOP; peak memory about {size(peak_memory(plan))}",
    )
