"""What the command line prints: plan, progress, summary, rules."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from acemerge.api import MergeReport
from acemerge.costs import operations, peak_memory
from acemerge.errors import UsageError, nearest
from acemerge.jobs import Plan
from acemerge.methods import METHODS
from acemerge.methods.about import parameters, summary
from acemerge.run import OnProgress
from acemerge.run import Progress as Finished

_QUIET_INTERVAL = 60.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def progress(console: Console, quiet: bool) -> Iterator[OnProgress]:
    """A live bar on a terminal, one line a minute elsewhere, nothing when quiet."""
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with _bar(console) as on_progress:
            yield on_progress
    else:
        yield _lines(console)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>10}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", table_column=None),
    )
    rate, bar = _Rate(), Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=None, rate="")

    def on_progress(done: Finished) -> None:
        bar.start()
        speed = rate(done)
        if rate.restarted:
            bar.reset(task)
        name = done.name if len(done.name) < 40 else "..." + done.name[-37:]
        about = name if done.stage == "merge" else f"{done.stage}: {name}"
        bar.update(task, completed=done.done, total=done.total, description=about, rate=f"{size(speed)}/s")
        if done.stage == "merge" and done.done == done.total:
            bar.stop()  # an upload shows bars of its own

    try:
        yield on_progress
    finally:
        bar.stop()


def _lines(console: Console) -> OnProgress:
    rate, last = _Rate(), time.monotonic()

    def on_progress(done: Finished) -> None:
        nonlocal last
        speed, now = rate(done), time.monotonic()
        if now - last < _QUIET_INTERVAL:
            return
        last = now
        left = (done.bytes_total - done.bytes_done) / max(speed, 1)
        stage = "" if done.stage == "merge" else f"{done.stage}: "
        say(console, f"{stage}{done.done}/{done.total} tensors, {size(speed)}/s, {left:.0f} s left, {done.name}")

    return on_progress


class _Rate:
    """Bytes per second since the beginning of a stage."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._before, self.restarted = 0, False

    def __call__(self, done: Finished) -> float:
        now = time.monotonic()
        self.restarted = done.bytes_done < self._before
        if self.restarted:  # another stage, and this its first report
            self._started = self._last
        self._before, self._last = done.bytes_done, now
        return done.bytes_done / max(now - self._started, 1e-9)


def merge_summary(console: Console, report: MergeReport) -> None:
    manifest = report.manifest
    counts = Counter(f"{record['rule']}" for record in report.tensors.values())
    rules = ", ".join(f"{count} by {rule}" for rule, count in counts.most_common())
    total = sum(entry["bytes"] for entry in manifest["outputs"].values())
    say(console, f"merged {len(report.tensors)} tensors ({rules}) in {manifest['seconds']:.1f} s")
    unusual = Counter(r["status"] for r in report.tensors.values() if r["status"] not in ("ok", "kept"))
    for status, count in unusual.most_common():
        say(console, f"{count} tensor{'s' if count > 1 else ''}: {_STATUS.get(status, status)}")
    for label, adapter in manifest.get("adapters", {}).items():
        say(console, f"expert {label}: {adapter}")
    for who, about in manifest.get("dequantized", {}).items():
        say(console, f"{who}: dequantised, {about}")
    for warning in manifest["warnings"]:
        say(console, f"warning: {warning}")
    if "stored" in manifest:
        _adapter(console, report)
    say(console, f"{report.out}: {size(total)}, manifest in acemerge.json")
    if report.pushed:
        say(console, f"uploaded to {report.pushed}")


def converted(console: Console, report: MergeReport) -> None:
    total = sum(entry["bytes"] for entry in report.manifest["outputs"].values())
    say(console, f"{report.out}: {len(report.tensors)} tensors, {size(total)}, manifest in acemerge.json")


_STATUS = {
    "no update": "no expert changed them, the base's values are kept",
    "float64": "ill-conditioned, computed again in float64",
    "pseudo-inverse": "singular, solved by the pseudo-inverse",
}


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
    for warning in plan.warnings:
        say(console, f"warning: {warning}")
    read = size(plan.bytes_read + plan.bytes_reread)
    say(
        console,
        f"{len(plan.jobs)} tensors; read {read}, write {size(plan.bytes_written)}; "
        f"{operations(plan) / 1e9:,.1f} GFLOP; peak memory about {size(peak_memory(plan))}",
    )


def extracted(console: Console, report: MergeReport) -> None:
    rows = [
        (name, f"{record['energy']:.4g}", f"{record['share_lost']:.2%}")
        for name, record in report.tensors.items()
        if record["energy"] or name in report.manifest["stored"]
    ]
    table(console, ("tensor", "energy of its difference", "lost"), rows)
    _adapter(console, report)


def _adapter(console: Console, report: MergeReport) -> None:
    """What an output that is an adapter holds and lacks."""
    manifest = report.manifest
    inside = manifest["stored"]
    outside = sum(record["energy"] > 0 for name, record in report.tensors.items() if name not in inside)
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
