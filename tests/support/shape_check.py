"""Shapes are checked at run time in every module of rules and numerics that states any: a new one is found."""

from __future__ import annotations

import re
from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[2] / "src"
PURE = ("linalg/*.py", "methods/*.py", "inspection/statistics.py")  # the others take what no type checks at run time
_SHAPE = re.compile(r"\b(Float|Int|Bool)\[")


def modules_with_shapes() -> list[str]:
    files = sorted(path for pattern in PURE for path in (ROOT / "acemerge").glob(pattern))
    stating = [file for file in files if _SHAPE.search(file.read_text())]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in stating]


def check_shapes() -> None:
    """Of what is imported from now on."""
    install_import_hook(modules_with_shapes(), "beartype.beartype")
