"""`acemerge demo`: three rules on models that are trained on the spot."""

from __future__ import annotations

from pathlib import Path

from acemerge.cli.command import command
from acemerge.cli.options import Options
from acemerge.cli.text import stdout


@command(
    "demo",
    group="More",
    takes=("out",),
    examples=("acemerge demo", "acemerge demo -o ./models"),
    page="demo.md",
    helps={"out": "folder for the models [default: acemerge-demo]"},
)
def demo(asked: Options) -> None:
    """Train a small vision transformer and six experts on real images, merge them by three rules, compare."""
    from acemerge.demo import run_demo

    run_demo(asked.out or Path("acemerge-demo"), stdout())
