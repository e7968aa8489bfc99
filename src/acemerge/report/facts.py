"""What the report page shows, as plain data: from the manifest, and from a look back where there was one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from acemerge.inspection.advice import Advice, largest_update, of_directions, of_energies, of_statuses, weights_of
from acemerge.inspection.look_back import LookBack
from acemerge.inspection.spectra import spectra_of
from acemerge.methods.status import Status, spelled
from acemerge.models.depth import layer_number, places_in_layers
from acemerge.output.length import Length, length_cure, length_of
from acemerge.output.records import TensorRecord, records_of
from acemerge.output.shares import Records, energies_of, layer_shares, total_energies
from acemerge.report.scores import Scores

_MOST_ROWS = 4000  # of the table: more take a browser too long


@dataclass(frozen=True)
class Facts:
    """`rows` are the tensors of the table, `filled` the figures that any of them has; `data` is what the charts draw;
    `answers` are questions with answers; `notes` say what the look back left out; `recipe` is a file of it.
    """

    manifest: Mapping[str, Any]
    answers: Sequence[tuple[str, str]]
    advice: Sequence[Advice]
    rows: Sequence[Mapping[str, Any]]
    filled: frozenset[str]
    left_out: int
    recipe: str
    data: Mapping[str, Any]
    why_not: str
    notes: Sequence[str] = ()
    scores: Scores | None = None


def page_facts(manifest: Mapping[str, Any], seen: LookBack | None, why_not: str, scores: Scores | None = None) -> Facts:
    """All that the page says."""
    labels: list[str] = manifest["experts"]
    records = records_of(manifest)
    energies = total_energies(labels, records)
    parts = places_in_layers(records.keys())
    rows = [_row(name, parts[name], record, labels, seen) for name, record in records.items()]
    length = length_of(labels, records)
    cure = "" if length is None else length_cure(length, manifest["recipe"])
    advice = [_with_cure(warning, cure) for warning in manifest.get("warnings", ())]
    said = [record.stats for record in records.values() if record.stats.statuses != (Status.NO_UPDATE,)]
    advice += of_statuses(stats.statuses for stats in said)
    gammas = [stats.largest(lambda part: part.gamma) for stats in said if stats.branch or stats.slices]
    method = manifest["recipe"].get("method", {})
    tau = method.get("tau", 0.3) if method.get("name") == "ace" else None
    known, weights = {str(line) for line in advice}, weights_of(manifest["recipe"], len(labels))
    advice += [line for line in of_energies(labels, energies, weights, gammas, tau) if str(line) not in known]
    if seen is not None:
        layers = [(name, probe.sums) for name, probe in seen.tensors.items() if probe.spectra]
        advice += of_directions(labels, seen.total.sums, layers)
    data: dict[str, Any] = {
        "experts": labels,
        "layers": [{key: row[key] for key in ("name", "layer", "part", *_HEAT)} for row in rows if row["energy"]],
        "shares": _shares(labels, records),
        "cosines": None if seen is None else _cosines(labels, seen),
        "spectra": {} if seen is None else spectra_of(seen),
        "seconds": _seconds(records),
        "scores": [] if scores is None else scores.points,
    }
    answers = _answers(manifest, rows, labels, energies, advice, seen, length)
    notes = [] if seen is None else _left_out(seen, data["spectra"])
    left_out = max(0, len(rows) - _MOST_ROWS)
    filled = frozenset(key for row in rows for key, value in row.items() if value not in (None, ""))
    recipe = _recipe_file(manifest["recipe"])
    return Facts(manifest, answers, advice, rows[:_MOST_ROWS], filled, left_out, recipe, data, why_not, notes, scores)


def _recipe_file(recipe: Mapping[str, Any]) -> str:
    given = {key: value for key, value in recipe.items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


# --- tensors -------------------------------------------------------------------------------------------------

_HEAT = ("energy", "gamma", "branch", "condition", "cancelled")


def _row(name: str, part: str, record: TensorRecord, labels: Sequence[str], seen: LookBack | None) -> dict[str, Any]:
    energies = energies_of(record, labels)
    total = sum(energies) if energies else None
    largest = max(range(len(labels)), key=lambda t: energies[t]) if energies and total else None
    probe = seen.tensors.get(name) if seen is not None else None
    return {
        "name": name,
        "layer": layer_number(name),
        "part": part,
        "role": record.role,
        "is_layer": record.is_layer,
        "rule": record.rule,
        "reason": record.reason,
        "status": spelled(record.stats.statuses),
        "energy": total,
        "gamma": record.stats.largest(lambda part: part.gamma),
        "branch": record.stats.branches,
        "condition": record.stats.largest(lambda part: part.condition),
        "cancelled": None if probe is None else probe.sums.cancelled,
        "largest": "" if largest is None else labels[largest],
        "share": None if largest is None or not energies or not total else energies[largest] / total,
        "seconds": record.seconds,
    }


def _shares(labels: Sequence[str], records: Records) -> list[dict[str, Any]]:
    shares = layer_shares(labels, records)
    return [
        {"layer": layer, "expert": label, "share": share}
        for layer, row in shares.items()
        for label, share in zip(labels, row, strict=True)
    ]


def _seconds(records: Records) -> list[dict[str, Any]]:
    sums: dict[int | None, float] = {}
    for name, record in records.items():
        sums[layer_number(name)] = sums.get(layer_number(name), 0.0) + record.seconds
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


def _with_cure(warning: str, cure: str) -> Advice:
    """A line of the manifest; where this is how it ends, its cure stands apart."""
    what = warning.removesuffix(f"; {cure}")
    return Advice(what, "" if what == warning else cure)


def _left_out(seen: LookBack, spectra: Mapping[str, Any]) -> list[str]:
    """What of the look back the page does not have."""
    notes = [f"{name} was passed over: its rows are matched by token" for name in seen.passed_over]
    more = sum(bool(probe.spectra) for probe in seen.tensors.values()) - len(spectra)
    if more:
        notes.append(f"the spectra of {more} more layers are left out, for the page would grow too large")
    return notes


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- in short ------------------------------------------------------------------------------------------------


def _answers(
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    energies: Sequence[float],
    advice: Sequence[Advice],
    seen: LookBack | None,
    length: Length | None,
) -> list[tuple[str, str]]:
    merged = sum(row["energy"] is not None for row in rows)
    files = len(manifest["outputs"])
    worked = (
        f"Yes: {len(rows)} tensors in {files} files, all finite, {merged} of them merged from {len(labels)} experts."
    )
    conflict = [row for row in rows if row["cancelled"] is not None and row["is_layer"]]
    worst = sorted(conflict, key=lambda row: -row["cancelled"])[:3]
    named = [f"{row['name']} ({row['cancelled']:.0%} cancels)" for row in worst]
    unrelated = f"Of equally long updates that have nothing in common, {1 - len(labels) ** -0.5:.0%} cancels."
    where = f"Most in {', '.join(named)}. {unrelated}" if named else "Not known without the models that were merged."
    cures = [line.cure for line in advice if line.cure and not line.cure.startswith("nothing to do")]
    return [
        ("Did it work?", worked),
        ("Which layers are in conflict?", where),
        ("Which expert dominates?", largest_update(labels, energies)),
        *([] if length is None else [("How far does it go?", f"The merged update is {length}.")]),
        ("What would I change?", f"{cures[0][:1].upper()}{cures[0][1:]}." if cures else "Nothing stands out."),
    ]
