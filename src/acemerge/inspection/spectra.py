"""Spectra for the report page: so many points of each curve that the page stays small, and what they are points of."""

from __future__ import annotations

from typing import Any

import torch

from acemerge.inspection.look_back import LookBack, Probe
from acemerge.shapes import Float, Tensor

_CURVE_BYTES = 2_000_000  # of all spectra together
_POINTS = (6, 32)  # of a curve: at least, at most
_ROUNDING = 1e-7  # beside the largest value


def spectra_of(seen: LookBack) -> dict[str, dict[str, Any]]:
    """By tensor its curves, each of points `[index, log10 of the singular value]`, and in words what they show.

    Where there are more layers than the page has room for, the last are left out.
    """
    found = {name: probe for name, probe in seen.tensors.items() if probe.spectra}
    curves = sum(len(probe.spectra) for probe in found.values())
    points = max(_POINTS[0], min(_POINTS[1], _CURVE_BYTES // (11 * max(1, curves))))
    most = max(1, _CURVE_BYTES // (11 * points * max(1, curves // max(1, len(found)))))
    return {name: _spectrum(probe, points) for name, probe in list(found.items())[:most]}


def _spectrum(probe: Probe, points: int) -> dict[str, Any]:
    curves = {label: curve(values, points) for label, values in probe.spectra.items()}
    return {"curves": curves, "about": _about(probe, points)}


def _about(probe: Probe, points: int) -> str:
    """How much of the spectrum is known, and how much of that is drawn."""
    known, side, slices = len(next(iter(probe.spectra.values()))), probe.side, probe.slices
    which = f"all {side} singular values" if known == side else f"the leading {known} of {side} singular values"
    parts = f", the root mean square over {slices} slices" if slices > 1 else ""
    drawn = f"; up to {points} points of a curve are drawn, its ends among them" if known > points else ""
    return f"{which}{parts}{drawn}; what is under 1e-7 of the largest is rounding and left out"


def curve(values: Float[Tensor, " k"], points: int) -> list[list[float]]:
    """Evenly spaced on a scale of logarithms, the ends included; what is rounding beside the largest left out."""
    kept = int((values > _ROUNDING * values[0]).sum()) if len(values) else 0
    if not kept:
        return []
    places = sorted({round(kept ** (i / (points - 1))) for i in range(points)} if points > 1 else {1})
    logs = values[torch.tensor(places) - 1].log10().tolist()
    return [[i, round(power, 3)] for i, power in zip(places, logs, strict=True)]
