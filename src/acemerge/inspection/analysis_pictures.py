"""The papers' figures: gamma, spectra, principal directions and conditions, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acemerge.inspection.analysis import Analysis, LayerAnalysis
from acemerge.inspection.analysis_tables import by_part, layer_rows
from acemerge.inspection.png import literal, new_figure, png_bytes

_PANELS = 4  # spectra that are shown, of layers from everywhere in the model
_ROUNDING = 1e-5  # of the largest singular value: less may be what float32 leaves of zero
_MERGED, _BEFORE = "#d62728", "#1f77b4"


def pictures(analysis: Analysis) -> dict[str, bytes]:
    """PNGs by file name. UsageError without matplotlib."""
    rows = layer_rows(analysis)
    made = {"spectra.png": _spectra(analysis)}
    gammas, conditions = by_part(rows, "gamma"), by_part(rows, "condition")
    if gammas:
        made["gamma.png"] = _by_depth(gammas, "gamma", analysis.tau)
    if conditions:
        made["conditions.png"] = _by_depth(conditions, "condition of the solved system")
    if any(layer.covariances for layer in analysis.layers):
        made["covariances.png"] = _covariances(rows)
    if len(analysis.experts) > 1:
        made["directions.png"] = _directions(analysis)
    return made


def _by_depth(parts: Mapping[str, Sequence[tuple[int, float]]], about: str, tau: float | None = None) -> bytes:
    """A line for every part of a layer, over the layers' numbers."""
    figure = new_figure(8, 4)
    axis = figure.subplots()
    for i, (part, points) in enumerate(parts.items()):
        depths, values = zip(*sorted(points), strict=True)
        axis.plot(depths, values, marker="o", color=f"C{i % 10}", ms=3, lw=1, ls=_style(i), label=literal(_short(part)))
    if tau is not None and tau > 0:
        axis.axhline(tau, color="black", lw=1, ls="--", label=f"tau = {tau:g}")
    if all(value > 0 for points in parts.values() for _, value in points):
        axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel(about)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return png_bytes(figure)


def _style(i: int) -> str:
    """Ten colours are soon used up."""
    return ("-", "--", ":", "-.")[i // 10 % 4]


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _spectra(analysis: Analysis) -> bytes:
    """The singular values of some layers, and of all layers the share of the energy in the top 5 % of them."""
    shown = _some(analysis.layers)
    figure = new_figure(max(2, len(shown) + 1) * 3.2, 3.4)
    axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axis, layer in zip(axes, shown, strict=False):
        curves = [(label, s, "0.6", 0.8) for label, s in zip(analysis.experts, layer.own, strict=True)]
        curves += [("before refinement", layer.before, _BEFORE, 1.5)] if layer.before else []
        curves.append(("merged", layer.merged, _MERGED, 1.5))
        for _, spectrum, colour, width in curves:
            kept = spectrum.values[spectrum.values > _ROUNDING * spectrum.values[:1]]
            axis.plot(range(1, len(kept) + 1), kept.tolist(), color=colour, lw=width)
        axis.set_yscale("log")
        axis.set_title(literal(_short(layer.name)), fontsize=7)
        axis.set_xlabel("singular value, by rank", fontsize=8)
        axis.tick_params(labelsize=7)
    _shares(axes[-1], analysis)
    handles = [axes[-1].plot([], [], color=colour, label=name)[0] for name, colour in
               (("experts", "0.6"), ("before refinement", _BEFORE), ("merged", _MERGED))]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return png_bytes(figure)


def _some(layers: Sequence[LayerAnalysis]) -> Sequence[LayerAnalysis]:
    """Evenly from the layers that were refined, else from all that have a spectrum."""
    there = [layer for layer in layers if layer.merged.share is not None]
    found = [layer for layer in there if layer.before is not None] or there
    count = min(_PANELS, len(found))
    places = torch.linspace(0, len(found) - 1, count).round().int().tolist() if count else []
    return [found[i] for i in places]


def _shares(axis: Any, analysis: Analysis) -> None:
    layers = analysis.layers
    own = [[layer.own[t].share for layer in layers] for t in range(len(analysis.experts))]
    lines = [(shares, "0.6", 0.8) for shares in own]
    lines.append(([layer.before.share if layer.before else None for layer in layers], _BEFORE, 1.5))
    lines.append(([layer.merged.share for layer in layers], _MERGED, 1.5))
    for shares, colour, width in lines:
        percent = [float("nan") if share is None else 100 * share for share in shares]
        axis.plot(range(1, len(percent) + 1), percent, color=colour, lw=width, marker=".", ms=3)
    axis.set_title("energy in the top 5 %, %", fontsize=8)
    axis.set_xlabel("matrix, in the model's order", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)


def _covariances(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """How near each stand-in is to the true second moments of the inputs, over the matrices in the model's order."""
    figure = new_figure(8, 3.5)
    axis = figure.subplots()
    stand_ins = (
        ("updates", "D^T D", _MERGED),
        ("rule", "the rule's estimate", _BEFORE),
        ("nothing", "identity", "0.6"),
    )
    for key, name, colour in stand_ins:
        values = [row[f"covariance_{key}"] for row in rows]
        found = [float("nan") if value is None else value for value in values]
        if any(value is not None for value in values):
            dashed = "--" if key == "rule" else "-"  # it may lie on the first
            axis.plot(range(1, len(found) + 1), found, color=colour, marker=".", lw=1, ls=dashed, label=name)
    axis.set_ylim(0, 1)
    axis.set_xlabel("matrix, in the model's order")
    axis.set_ylabel("cosine with the true second moment")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return png_bytes(figure)


def _directions(analysis: Analysis) -> bytes:
    """Maps of the experts' cosines, mean over the layers, on both sides."""
    size = 1.5 + 0.45 * len(analysis.experts)
    figure = new_figure(4 * size + 1, size + 1)
    axes = figure.subplots(1, 4)
    kinds = [(side, what) for side in ("inputs", "outputs") for what in ("first", "overlap")]
    titles = {"first": "first directions", "overlap": "spaces of the top 5 %"}
    image = None
    for axis, (side, what) in zip(axes, kinds, strict=True):
        stack = torch.stack([getattr(getattr(layer, side), what) for layer in analysis.layers])
        image = axis.imshow(stack.nanmean(0), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"{side}: {titles[what]}", fontsize=8)
        ticks = range(len(analysis.experts))
        axis.set_xticks(ticks, [literal(label) for label in analysis.experts], rotation=45, ha="right", fontsize=7)
        axis.set_yticks(ticks, [literal(label) for label in analysis.experts], fontsize=7)
        _write(axis, stack.nanmean(0).tolist())
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine, mean over layers")
    return png_bytes(figure)


def _write(axis: Any, values: Sequence[Sequence[float]]) -> None:
    """The numbers into their cells, where these are few."""
    if len(values) > 12:
        return
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6,
                          color="black" if value > 0.6 else "white")  # fmt: skip
