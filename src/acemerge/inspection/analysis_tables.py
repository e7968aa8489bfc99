"""What an analysis found, as plain data, as a row for each layer and as a page to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from acemerge.inspection.analysis import Analysis, Directions, LayerAnalysis, Spectrum
from acemerge.inspection.spectra import curve
from acemerge.inspection.survey import numbers
from acemerge.linalg.principal import principal_count
from acemerge.methods.status import spelled
from acemerge.models.depth import layer_number, places_in_layers
from acemerge.output.markdown import plain
from acemerge.shapes import Float, Tensor

FORMAT = "acemerge-analysis-1"
_POINTS = 48  # of a spectrum
Row = dict[str, Any]


def layer_rows(analysis: Analysis) -> list[Row]:
    """Of every layer its figures, without matrices and spectra; None where there is no such figure."""
    parts = places_in_layers([layer.name for layer in analysis.layers])
    return [_row(layer, parts[layer.name]) for layer in analysis.layers]


def _row(layer: LayerAnalysis, part: str) -> Row:
    stats, (out_features, in_features) = layer.stats, layer.shape
    return {
        "name": layer.name,
        "layer": layer_number(layer.name),
        "part": part,
        "role": layer.role,
        "out": out_features,
        "in": in_features,
        "gamma": layer.gamma,
        "branch": stats.branches,
        "condition": stats.largest(lambda part: part.condition),
        "rank": stats.largest(lambda part: part.rank),
        "status": spelled(stats.statuses),
        "share_experts": _mean(spectrum.share for spectrum in layer.own),
        "share_before": None if layer.before is None else layer.before.share,
        "share_merged": layer.merged.share,
        **_of_side("inputs", layer.inputs, layer.shape, in_features),
        **_of_side("outputs", layer.outputs, layer.shape, out_features),
        **{f"covariance_{key}": _mean(values) for key, values in covariances(layer).items()},
    }


def covariances(layer: LayerAnalysis) -> dict[str, Sequence[float | None]]:
    """Cosines with the true input second moments, by what stands in for them; empty where nothing was measured."""
    found = layer.covariances
    nothing: tuple[float | None, ...] = ()
    return {key: nothing if found is None else getattr(found, key) for key in ("updates", "rule", "nothing")}


def _of_side(side: str, found: Directions, shape: tuple[int, int], size: int) -> Row:
    """Means over the pairs of experts, and the overlap of directions that have nothing to do with each other."""
    return {
        f"first_{side}": _mean(between(found.first)),
        f"overlap_{side}": _mean(between(found.overlap)),
        f"chance_{side}": (principal_count(shape) / size) ** 0.5,
    }


def between(matrix: Float[Tensor, "T T"]) -> list[float | None]:
    """Of a symmetric matrix what is above the diagonal, None for what is not finite."""
    rows, columns = _above(len(matrix))
    return numbers(matrix[rows, columns])


def _above(count: int) -> tuple[list[int], list[int]]:
    pairs = [(s, t) for s in range(count) for t in range(s + 1, count)]
    return [s for s, _ in pairs], [t for _, t in pairs]


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def summary(analysis: Analysis, rows: Sequence[Row]) -> Row:
    """The whole model: `rows` are those of `layer_rows`."""
    gammas = [row["gamma"] for row in rows if row["gamma"] is not None]
    refined = [row for row in rows if row["share_before"] is not None]
    labelled = enumerate(analysis.experts)
    return {
        "layers": len(rows),
        "tau": analysis.tau,
        "gamma": analysis.gamma,
        "gamma_of_layers": _spread(gammas),
        "above_tau": sum(gamma > analysis.tau for gamma in gammas),
        "condition": _spread([row["condition"] for row in rows if row["condition"] is not None]),
        "shares": {label: _mean(layer.own[t].share for layer in analysis.layers) for t, label in labelled},
        "share_merged": _mean(row["share_merged"] for row in rows),
        "refined": len(refined),
        "refined_before": _mean(row["share_before"] for row in refined),
        "refined_merged": _mean(row["share_merged"] for row in refined),
        "directions": {
            f"{what}_{side}": _mean(row[f"{what}_{side}"] for row in rows)
            for side in ("inputs", "outputs")
            for what in ("first", "overlap", "chance")
        },
        "covariances": {key: _mean(row[f"covariance_{key}"] for row in rows) for key in ("updates", "rule", "nothing")},
        "measured": sum(row["covariance_updates"] is not None for row in rows),
    }


def _spread(values: Sequence[float]) -> Row | None:
    return {"least": min(values), "median": median(values), "most": max(values)} if values else None


def as_json(analysis: Analysis) -> Row:
    """Everything, spectra as points `[number, log10 of the singular value]`."""
    rows = layer_rows(analysis)
    return {
        "format": FORMAT,
        "base": analysis.base,
        "experts": list(analysis.experts),
        "rule": analysis.rule,
        "model": summary(analysis, rows),
        "layers": [_whole(row, layer, analysis.experts) for row, layer in zip(rows, analysis.layers, strict=True)],
    }


def _whole(row: Row, layer: LayerAnalysis, labels: Sequence[str]) -> Row:
    sides = {"inputs": layer.inputs, "outputs": layer.outputs}
    return {
        **row,
        "energies": layer.energies.tolist(),
        "shares": {label: spectrum.share for label, spectrum in zip(labels, layer.own, strict=True)},
        "first": {side: [numbers(line) for line in found.first] for side, found in sides.items()},
        "overlap": {side: [numbers(line) for line in found.overlap] for side, found in sides.items()},
        "covariances": {key: list(values) for key, values in covariances(layer).items()},
        "spectra": {
            "experts": {label: _points(spectrum) for label, spectrum in zip(labels, layer.own, strict=True)},
            "before": _points(layer.before),
            "merged": _points(layer.merged),
        },
    }


def _points(spectrum: Spectrum | None) -> list[list[float]] | None:
    return None if spectrum is None else curve(spectrum.values, _POINTS)


def as_csv(analysis: Analysis) -> str:
    """`layer_rows`, and each expert's share; empty where there is no such figure."""
    text = io.StringIO()
    rows = layer_rows(analysis)
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*(rows[0] if rows else ["name"]), *(f"share: {label}" for label in analysis.experts)])
    for row, layer in zip(rows, analysis.layers, strict=True):
        values = [_no_formula(value) if isinstance(value, str) else value for value in row.values()]
        lines.writerow([*values, *(spectrum.share for spectrum in layer.own)])
    return text.getvalue()


def _no_formula(text: str) -> str:
    """A spreadsheet runs what begins like one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


Table = tuple[str, list[str], list[list[str]]]  # what it is of, the names of its columns, its rows


def tables(analysis: Analysis) -> Iterator[Table]:
    """The whole model in a few tables, for people."""
    found = summary(analysis, layer_rows(analysis))
    above = f"{found['above_tau']} of {found['layers']} layers above tau = {analysis.tau:g}"
    yield (
        f"{found['layers']} layers, {above}; gamma of the whole model {_text(found['gamma'])}",
        ["over the layers", "least", "median", "most"],
        [
            [name, *(_text(found[key] and found[key][end]) for end in ("least", "median", "most"))]
            for name, key in (("gamma", "gamma_of_layers"), ("condition of the solved system", "condition"))
        ],
    )
    shares = [[f"expert {label}", _percent(share)] for label, share in found["shares"].items()]
    shares.append([f"merged by {analysis.rule}", _percent(found["share_merged"])])
    if found["refined"]:
        where = f"in the {found['refined']} layers that it refined"
        shares.append([f"{where}, before", _percent(found["refined_before"])])
        shares.append([f"{where}, after", _percent(found["refined_merged"])])
    yield "Energy in the top 5 % of the singular values, mean over the layers", ["update", "share"], shares
    if len(analysis.experts) > 1:
        yield (
            "Cosines between the principal directions of two experts, mean over pairs and layers",
            ["side", "first directions", "spaces of the top 5 %", "the same by chance"],
            [
                [side, *(_text(found["directions"][f"{what}_{side}"]) for what in ("first", "overlap", "chance"))]
                for side in ("inputs", "outputs")
            ],
        )

    if found["measured"]:
        named = (
            ("updates", "D^T D"),
            ("rule", f"the estimate of {analysis.rule}"),
            ("nothing", "the identity, for comparison"),
        )
        yield (
            f"Cosine with the experts' true input second moments, mean over experts and {found['measured']} layers",
            ["stand-in", "cosine"],
            [[name, _text(found["covariances"][key])] for key, name in named],
        )


def markdown(analysis: Analysis) -> str:
    """The tables, and the figures of every layer."""
    parts = [_markdown_table(*table) for table in tables(analysis)]
    shown = ("gamma", "branch", "condition", "share_experts", "share_before", "share_merged", "overlap_inputs")
    heading = ["layer", "gamma", "branch", "condition", "experts", "before", "merged", "overlap"]
    lines = [[row["name"], *(_text(row[key]) for key in shown)] for row in layer_rows(analysis)]
    about = "Layer by layer: shares of the energy in the top 5 % as fractions, the overlap on the side of the inputs"
    return "\n\n".join([*parts, _markdown_table(about, heading, lines)]) + "\n"


def _markdown_table(about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [map(plain, header), ["---", *("--:" for _ in header[1:])], *(map(plain, row) for row in rows)]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{about}:\n\n{grid}"


def _text(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def by_part(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """For every part of a layer the pairs of the layer's number and a figure, those that have both."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["layer"] is not None and row[key] is not None:
            found.setdefault(row["part"], []).append((row["layer"], row[key]))
    return found
