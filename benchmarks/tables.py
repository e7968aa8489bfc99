"""Rows of measurements as Markdown tables."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from shapes import Case, Model
from turns import Measured

TEXT = ("rule", "layer", "experts x out x in", "branch", "status")
COLUMNS = (
    *("rule", "layer", "experts x out x in", "branch", "theirs s", "ours s", "ratio", "theirs MB", "ours MB"),
    *("memory ratio", "GFLOP", "time/floor", "difference", "status"),
)
OF_TWO = ("theirs s", "ratio", "theirs MB", "memory ratio", "difference")  # left out where there is no rival
NOISY = 0.05  # share of the processors that others may take before a row says so
FEW_OPERATIONS = 64  # per entry: below it memory sets the pace, and the floor by products says nothing


@dataclass(frozen=True)
class Row:
    """One layer shape: `theirs` is None where our rule is timed by itself."""

    case: Case
    layers: str
    branch: str
    theirs: Measured | None
    ours: Measured
    difference: float

    @property
    def ratio(self) -> float:
        return self.theirs.best / self.ours.best if self.theirs else math.nan

    @property
    def memory_ratio(self) -> float:
        return self.theirs.added_mb / self.ours.added_mb if self.theirs and self.ours.added_mb else math.nan

    @property
    def over_floor(self) -> float:
        entries = self.case.experts * self.case.rows * self.case.columns
        products = self.ours.about.get("flop", 0) >= FEW_OPERATIONS * entries
        return self.ours.best / self.ours.floor if products else math.nan

    def numbers(self) -> dict[str, Any]:
        """What follows from the measurements, for the JSON file."""
        sides = {"theirs": self.theirs, "ours": self.ours}
        times = {
            name: {"best": side.best, "median": side.median, "floor": side.floor}
            for name, side in sides.items()
            if side is not None
        }
        return {"times": times, "ratio": self.ratio, "memory_ratio": self.memory_ratio, "over_floor": self.over_floor}


def context(against: str, threads: int) -> dict[str, Any]:
    """What was measured on what."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {"torch": torch.__version__, "threads": threads, "cpu": cpu or platform.machine(), "theirs": against}


def heading(about: dict[str, Any]) -> str:
    """The context and the head of the table."""
    shown = _shown(about["theirs"])
    text = f"torch {about['torch']}, {about['threads']} threads, {about['cpu']}; theirs: {about['theirs']}"
    return f"{text}\n\n{_cells(shown)}\n|{''.join('---|' if name in TEXT else '--:|' for name in shown)}"


def line(row: Row, against: str) -> str:
    """One measured row of the table that `heading` began."""
    case, theirs = row.case, row.theirs
    mark = "~" if theirs and theirs.extrapolated else ""
    gflop = row.ours.about.get("flop", math.nan) / 1e9
    cells = {
        "rule": case.rule,
        "layer": row.layers,
        "experts x out x in": f"{case.experts} x {case.rows} x {case.columns}",
        "branch": row.branch,
        "theirs s": mark + seconds(theirs.best) if theirs else "",
        "ours s": seconds(row.ours.best),
        "ratio": mark + fixed(row.ratio),
        "theirs MB": fixed(theirs.added_mb, 0) if theirs else "",
        "ours MB": fixed(row.ours.added_mb, 0),
        "memory ratio": fixed(row.memory_ratio),
        "GFLOP": f"{gflop:.3g}" if gflop == gflop else "",
        "time/floor": fixed(row.over_floor),
        "difference": f"{row.difference:.1e}" if row.difference == row.difference else "",
        "status": _status(row),
    }
    return _cells([cells[name] for name in _shown(against)])


def _status(row: Row) -> str:
    words = [row.ours.error or row.ours.status]
    if row.theirs and row.theirs.error:
        words.append(f"theirs: {row.theirs.error}")
    for whose, side in (("their", row.theirs), ("our", row.ours)):
        if side and side.noise > NOISY:
            words.append(f"other processes took {side.noise:.0%} of the processors in {whose} run")
    return "; ".join(words)


def _shown(against: str) -> list[str]:
    return [name for name in COLUMNS if against != "none" or name not in OF_TWO]


def means(rows: list[Row]) -> str:
    """Geometric mean and smallest of the ratios, by rule, and how far above the floor."""
    lines = []
    for rule in dict.fromkeys(row.case.rule for row in rows):
        own = [row for row in rows if row.case.rule == rule]
        if above := [row.over_floor for row in own if row.over_floor > 0]:
            lines.append(
                f"{rule}: {geometric_mean(above):.2f} times the floor in geometric mean, {max(above):.2f} at most"
            )
        for what, ratios in (
            ("time", [row.ratio for row in own if row.ratio > 0]),
            ("memory", [row.memory_ratio for row in own if 0 < row.memory_ratio < math.inf]),
        ):
            if ratios:
                mean, least = geometric_mean(ratios), min(ratios)
                lines.append(f"{rule}: {what} ratio {mean:.2f} in geometric mean, {least:.2f} at least")
    return "\n" + "\n".join(f"- {text}" for text in lines) if lines else ""


def totals(models: dict[str, Model], rows: list[Row]) -> str:
    """Layer times times the number of such layers, for every model whose layers were all measured."""
    head = _cells(("model", "experts", "layers", "rule", "branch", "theirs s", "ours s", "ratio", "floor s"))
    lines = []
    for model in models.values():
        for rule, branch in dict.fromkeys((row.case.rule, row.branch) for row in rows):
            parts = _parts(model, [row for row in rows if (row.case.rule, row.branch) == (rule, branch)])
            if parts:
                layers = str(sum(layer.count for layer in model.layers))
                lines.append(_cells((model.title, str(model.experts), layers, rule, branch, *_sums(parts))))
    return "\n".join(["", head, f"|---|--:|--:|---|---|{'--:|' * 4}", *lines]) if lines else ""


def _parts(model: Model, rows: list[Row]) -> list[tuple[Row, int]]:
    """The row of every layer of the model and how many such layers there are; nothing when one is missing."""
    found = {(row.case.experts, row.case.rows, row.case.columns): row for row in rows}
    shapes = [((model.experts, layer.rows, layer.columns), layer.count) for layer in model.layers]
    return [(found[shape], count) for shape, count in shapes] if all(shape in found for shape, _ in shapes) else []


def _sums(parts: list[tuple[Row, int]]) -> tuple[str, str, str, str]:
    theirs = sum(count * (row.theirs.best if row.theirs else math.nan) for row, count in parts)
    ours = sum(count * row.ours.best for row, count in parts)
    floor = sum(count * row.ours.floor for row, count in parts)
    mark = "~" if any(row.theirs and row.theirs.extrapolated for row, _ in parts) else ""
    return mark + seconds(theirs), seconds(ours), mark + fixed(theirs / ours), seconds(floor)


def seconds(value: float) -> str:
    """Three significant digits; empty for NaN."""
    if value != value:
        return ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _cells(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
