"""The floors of the house, from the top: which rooms are on each and what it is for. The picture is drawn of this
table, and a test holds every module and every import against it.

`python docs/hooks/house.py` draws docs/house.svg anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "house.svg"


@dataclass(frozen=True)
class Floor:
    """Rooms that import nothing of one another and nothing from above. A room is a package or a module directly in
    `acemerge`.
    """

    rooms: tuple[str, ...]
    title: str
    about: str


FLOORS = (
    Floor(("__main__", "ui"), "Doors", "the process, and the page for a browser"),
    Floor(("cli",), "Commands", "one command, one file: its options, what it prints"),
    Floor(("reproduction",), "Experiments", "the papers' own, as packs"),
    Floor(("__init__", "evaluation", "extract", "demo"), "Uses", "public names; scores, rules side by side"),
    Floor(("api",), "One path", "what command line and Python share"),
    Floor(("runs",), "Runs", "a plan carried out, or several in one pass"),
    Floor(("report",), "Report", "the page about a merge"),
    Floor(("inspection",), "Looking", "at experts, at finished merges; the papers' figures"),
    Floor(("calibration", "integrations"), "Measuring", "on the experts' own data; inside mergekit"),
    Floor(("engine",), "The engine", "open, read ahead, compute, go on"),
    Floor(("output",), "The output", "write, journal, manifest, card, verify"),
    Floor(("planning",), "The plan", "recipe and headers to jobs; what is refused"),
    Floor(("tasks",), "Tasks", "what a model is asked: data, heads, networks"),
    Floor(("recipes",), "Recipes", "what the user asks for; mergekit's files"),
    Floor(("methods", "models"), "Rules and models", "tensors in, tensors out; what a model is"),
    Floor(("linalg", "checkpoints"), "Tools", "numerics; the only calls to storage"),
    Floor(("errors", "shapes"), "Ground", "failures, and shapes as types"),
)

# An import that climbs, and why it may.
EXCEPTIONS = {
    ("cli.ui", "ui.folders"): "the command starts the page, inside its function",
    ("cli.ui", "ui.server"): "the command starts the page, inside its function",
}


def floor_of(room: str) -> int | None:
    """Counted from the ground; None for a room that is on no floor."""
    return next((len(FLOORS) - i for i, floor in enumerate(FLOORS) if room in floor.rooms), None)


def picture() -> str:
    """The house as SVG: the floors under a roof."""
    height, left, width = 44, 40, 680
    top = 96
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {top + height * len(FLOORS) + 14}" role="img" '
        'aria-labelledby="t d" font-family="system-ui, sans-serif">',
        '  <title id="t">The house of acemerge</title>',
        f'  <desc id="d">{len(FLOORS)} floors of rooms under a roof. Every floor imports only from those below.</desc>',
        '  <path d="M380 6 L740 88 H20 Z" fill="#0f5c57"/>',
        '  <text x="380" y="68" text-anchor="middle" fill="#ffffff" font-size="19" font-weight="600">acemerge</text>',
    ]
    for i, floor in enumerate(FLOORS):
        y = top + height * i
        fill = "#cfd8d7" if i == len(FLOORS) - 1 else ("#e3f1ef", "#d3e8e5")[i % 2]
        lines += [
            f'  <rect x="{left}" y="{y}" width="{width}" height="{height - 4}" rx="4" fill="{fill}" stroke="#3d8782"/>',
            f'  <text x="56" y="{y + 18}" fill="#0a2f2d" font-size="14" font-weight="600">{floor.title}</text>',
            f'  <text x="56" y="{y + 33}" fill="#33514f" font-size="12">{floor.about}</text>',
            f'  <text x="704" y="{y + 25}" text-anchor="end" fill="#0a2f2d" font-size="13" '
            f'font-family="ui-monospace, monospace">{"  ".join(floor.rooms)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
