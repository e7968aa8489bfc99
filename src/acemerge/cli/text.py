"""What the command line prints: plans, outputs, rules."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from acemerge.api import MergeReport
from acemerge.engine.foreseen import expected_memory
from acemerge.errors import UsageError, nearest
from acemerge.methods import METHODS, rule_name
from acemerge.methods.about import parameters, summary
from acemerge.planning.costs import operations
from acemerge.planning.jobs import Plan


def converted(console: Console, report: MergeReport) -> None:
    total = sum(entry["bytes"] for entry in report.manifest["outputs"].values())
    say(console, f"{report.out}: {len(report.tensors)} tensors, {size(total)}, manifest in acemerge.json")


def plan(console: Console, plan: Plan) -> None:
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
        f"{operations(plan) / 1e9:,.1f} GFLOP; peak memory about {size(expected_memory(plan))}",
    )


def extracted(console: Console, report: MergeReport) -> None:
    rows = [
        (name, f"{record.energy:.4g}", f"{record.share_lost:.2%}")
        for name, record in report.records.items()
        if record.energy or name in report.manifest["stored"]
    ]
    table(console, ("tensor", "energy of its difference", "lost"), rows)
    adapter(console, report)


def adapter(console: Console, report: MergeReport) -> None:
    """What an output that is an adapter holds and lacks."""
    manifest = report.manifest
    inside = manifest["stored"]
    outside = sum(bool(record.energy) for name, record in report.records.items() if name not in inside)
    if outside:
        say(console, f"warning: {outside} tensors changed that a LoRA of linear layers cannot hold")
    for label, heads in manifest["heads"].items():
        for name in heads:
            say(console, f"warning: {name} is not in the adapter: kept in heads/{label}.safetensors")
    lost = f"{manifest['share_lost']:.2%} of the energy lost in all"
    rank = manifest["recipe"]["as_lora"]
    say(console, f"{report.out}: adapter of {len(inside)} layers, rank {rank}, {lost}")


def verified(console: Console, out: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest["outputs"]
    total = size(sum(entry["bytes"] for entry in files.values()))
    say(console, f"{out}: {len(files)} files, {len(manifest['tensors'])} tensors, {total}, all as written")


def methods(console: Console, name: str | None) -> None:
    if name is None:
        rows = [
            (
                rule.name,
                ", ".join(f"{p.name}={p.default}" for p in parameters(rule)),
                summary(rule),
                rule.source,
            )
            for rule in METHODS.values()
        ]
        table(console, ("rule", "parameters", "what it does", "source"), rows)
        return
    name = rule_name(name)
    if name not in METHODS:
        raise UsageError(f"method {name!r}", "no such rule", nearest(name, list(METHODS)))
    rule = METHODS[name]
    say(console, f"{rule.name}\n\n{inspect.getdoc(rule)}\n")
    table(console, ("parameter", "default", "meaning"), [(p.name, p.default, p.meaning) for p in parameters(rule)])


def table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[str] = ()
) -> None:
    """A plain table; `numeric` columns stand at the right."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold", justify="right" if column in numeric else "left")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console.print(grid)


def say(console: Console, text: str) -> None:
    """Plain text: names from files are never read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
