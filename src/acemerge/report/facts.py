"""What the report page shows, as plain data: from the manifest, and from a look back where there was one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acemerge.advice import Advice, of_directions, of_energies
from acemerge.probe import LookBack, Probe
from acemerge.report.records import branch, figure
from acemerge.report.shares import LAYER, Records, energies_of, layer_of, layer_shares, total_energies
from acemerge.shapes import Float, Tensor

_CURVE_BYTES = 2_000_000  # of all spectra together
_POINTS = (6, 32)  # of a curve: at least, at most
_MOST_ROWS = 4000  # of the table: more take a browser too long


@dataclass(frozen=True)
class Facts:
    """`rows` are the tensors of the table; `data` is what the charts draw; `answers` are questions with answers."""

    manifest: Mapping[str, Any]
    answers: Sequence[tuple[str, str]]
    advice: Sequence[Advice]
    rows: Sequence[Mapping[str, Any]]
    left_out: int
    data: Mapping[str, Any]
    why_not: str


def page_facts(manifest: Mapping[str, Any], seen: LookBack | None, why_not: str) -> Facts:
    """All that the page says."""
    labels: list[str] = manifest["experts"]
    records: Records = manifest["tensors"]
    energies = total_energies(labels, records)
    rows = [_row(name, record, labels, seen) for name, record in records.items()]
    name_parts(rows)
    advice = [Advice(warning, "") for warning in manifest.get("warnings", ())]
    advice += [_of_status(status, count) for status, count in _unusual(records).items()]
    gammas = [figure(record, "gamma") for record in records.values() if "gamma" in record or "slices" in record]
    method = manifest["recipe"].get("method", {})
    tau = method.get("tau", 0.3) if method.get("name") == "ace" else None
    advice += of_energies(labels, energies, gammas, tau)
    if seen is not None:
        layers = [(name, probe.sums) for name, probe in seen.tensors.items() if probe.spectra]
        advice += of_directions(labels, seen.total.sums, layers)
    data = {
        "experts": labels,
        "layers": [{key: row[key] for key in ("name", "layer", "part", *_HEAT)} for row in rows if row["energy"]],
        "shares": _shares(labels, records),
        "cosines": None if seen is None else _cosines(labels, seen),
        "spectra": {} if seen is None else _spectra(seen),
        "seconds": _seconds(records),
    }
    answers = _answers(manifest, rows, labels, energies, advice, seen)
    return Facts(manifest, answers, advice, rows[:_MOST_ROWS], max(0, len(rows) - _MOST_ROWS), data, why_not)


# --- tensors -------------------------------------------------------------------------------------------------

_LAYERS = ("linear", "conv1d", "experts")
_HEAT = ("energy", "gamma", "branch", "condition", "cancelled")


def _row(name: str, record: Mapping[str, Any], labels: Sequence[str], seen: LookBack | None) -> dict[str, Any]:
    energies = energies_of(record, labels)
    total = sum(energies) if energies else None
    largest = max(range(len(labels)), key=lambda t: energies[t]) if energies and total else None
    probe = seen.tensors.get(name) if seen is not None else None
    return {
        "name": name,
        "layer": layer_of(name),
        "part": name,
        "role": str(record.get("role", "")),
        "rule": str(record.get("rule", "")),
        "reason": str(record.get("reason", "")),
        "status": str(record.get("status", "")),
        "energy": total,
        "gamma": figure(record, "gamma"),
        "branch": branch(record),
        "condition": figure(record, "condition"),
        "cancelled": None if probe is None else probe.sums.cancelled,
        "largest": "" if largest is None else labels[largest],
        "share": None if largest is None or not energies or not total else energies[largest] / total,
        "seconds": _seconds_of(record),
    }


def name_parts(rows: Sequence[dict[str, Any]]) -> None:
    """A tensor's place within its layer: its name without the number, and without what is before where all share it."""
    found = {row["name"]: LAYER.search(row["name"]) for row in rows}
    before = {name[: match.start()] for name, match in found.items() if match}
    for row in rows:
        match = found[row["name"]]
        if match:
            rest = row["name"][match.end() :]
            row["part"] = rest if len(before) == 1 else f"{row['name'][: match.start()]}.{rest}".strip(".")


def _shares(labels: Sequence[str], records: Records) -> list[dict[str, Any]]:
    shares = layer_shares(labels, records)
    return [
        {"layer": layer, "expert": label, "share": share}
        for layer, row in shares.items()
        for label, share in zip(labels, row, strict=True)
    ]


def _seconds_of(record: Mapping[str, Any]) -> float:
    found = record.get("seconds")
    return float(found) if isinstance(found, int | float) else 0.0


def _seconds(records: Records) -> list[dict[str, Any]]:
    sums: dict[int | None, float] = {}
    for name, record in records.items():
        sums[layer_of(name)] = sums.get(layer_of(name), 0.0) + _seconds_of(record)
    ordered = sorted(sums.items(), key=lambda entry: (entry[0] is None, entry[0] or 0))
    return [{"layer": "rest" if layer is None else str(layer), "seconds": seconds} for layer, seconds in ordered]


# --- what the look back saw ----------------------------------------------------------------------------------


def _cosines(labels: Sequence[str], seen: LookBack) -> list[dict[str, Any]]:
    """Between the experts, and of each with the merged update, which is the last row and column."""
    total = seen.total
    T = len(labels)
    cosines = torch.eye(T + 1, dtype=torch.float64)
    cosines[:T, :T] = total.sums.cosines
    cosines[T, :T] = cosines[:T, T] = total.agreement
    names = [*labels, "merged"]
    return [
        {"a": a, "b": b, "cosine": _finite(cosines[i, j].item())}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spectra(seen: LookBack) -> dict[str, dict[str, list[list[float]]]]:
    """By tensor and curve, points `[index, log10 of the singular value]`, so many that the page stays small."""
    found = {name: probe for name, probe in seen.tensors.items() if probe.spectra}
    curves = sum(len(probe.spectra) for probe in found.values())
    points = max(_POINTS[0], min(_POINTS[1], _CURVE_BYTES // (11 * max(1, curves))))
    most = max(1, _CURVE_BYTES // (11 * points * max(1, curves // max(1, len(found)))))
    return {name: _curves(probe, points) for name, probe in list(found.items())[:most]}


def _curves(probe: Probe, points: int) -> dict[str, list[list[float]]]:
    return {label: curve(values, points) for label, values in probe.spectra.items()}


def curve(values: Float[Tensor, " k"], points: int) -> list[list[float]]:
    """Evenly spaced on a scale of logarithms, the ends included; what is rounding beside the largest left out."""
    kept = int((values > 1e-7 * values[0]).sum()) if len(values) else 0
    if not kept:
        return []
    places = sorted({round(kept ** (i / (points - 1))) for i in range(points)} if points > 1 else {1})
    logs = values[torch.tensor(places) - 1].log10().tolist()
    return [[i, round(power, 3)] for i, power in zip(places, logs, strict=True)]


# --- in short ------------------------------------------------------------------------------------------------


def _unusual(records: Records) -> Counter[str]:
    statuses = Counter(str(record.get("status", "")) for record in records.values())
    return Counter({s: n for s, n in statuses.items() if s not in ("ok", "kept", "no update", "")})


def _of_status(status: str, count: int) -> Advice:
    tensors = f"{count} tensor{'s' if count > 1 else ''}"
    known = {
        "float64": (f"{tensors}: ill-conditioned, computed again in float64", "nothing to do; a larger eps avoids it"),
        "pseudo-inverse": (f"{tensors}: singular, solved by the pseudo-inverse", "a larger eps makes them regular"),
        "not converged": (f"{tensors}: stopped before the residual was small", "more steps, or a larger tol"),
    }
    return Advice(*known.get(status, (f"{tensors}: {status}", "")))


def _answers(
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    energies: Sequence[float],
    advice: Sequence[Advice],
    seen: LookBack | None,
) -> list[tuple[str, str]]:
    merged = sum(row["energy"] is not None for row in rows)
    files = len(manifest["outputs"])
    worked = (
        f"Yes: {len(rows)} tensors in {files} files, all finite, {merged} of them merged from {len(labels)} experts."
    )
    conflict = [row for row in rows if row["cancelled"] is not None and row["role"] in _LAYERS]
    worst = sorted(conflict, key=lambda row: -row["cancelled"])[:3]
    total = sum(energies)
    leader = max(range(len(labels)), key=lambda t: energies[t], default=None)
    named = [f"{row['name']} ({row['cancelled']:.0%} cancels)" for row in worst]
    unrelated = f"of unrelated updates of one size {1 - len(labels) ** -0.5:.0%} cancels"
    where = f"Most in {', '.join(named)}; {unrelated}." if named else "Not known without the models that were merged."
    who = "No expert changed anything."
    if leader is not None and total:
        share = energies[leader] / total
        who = f"{labels[leader]} has {share:.0%} of the energy; an equal share were {1 / len(labels):.0%}."
    cures = [line.cure for line in advice if line.cure and not line.cure.startswith("nothing to do")]
    return [
        ("Did it work?", worked),
        ("Which layers are in conflict?", where),
        ("Which expert dominates?", who),
        ("What would I change?", f"{cures[0][:1].upper()}{cures[0][1:]}." if cures else "Nothing stands out."),
    ]
