"""The rules side by side: accuracy normalised by the experts, each task a dot, their mean a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw(rows: Sequence[tuple[str, Mapping[str, float]]], experts: Mapping[str, float], file: Path) -> None:
    """Write a picture of named rows of scores; `file` ends in .png or .svg. Needs matplotlib (extra `eval`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, _ in rows]
    shares = [[100 * scores[task] / experts[task] for task in experts] for _, scores in rows]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [sum(found) / len(found) for found in shares], color="0.8")
    for number, task in enumerate(experts):
        axes.plot([found[number] for found in shares], places, "o", markersize=4, label=task)
    axes.axvline(100, color="0.4", linewidth=0.8)
    axes.set_yticks(places, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first on top, no room beyond the bars
    axes.set_xlim(left=0)
    axes.set_xlabel("accuracy, % of the expert's own (bar: mean over tasks)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
