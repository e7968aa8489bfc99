"""Pictures for people who asked for them: what matplotlib is needed for."""

from __future__ import annotations

import io
from typing import Any

from acemerge.errors import UsageError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("picture", "matplotlib is not installed", "pip install 'acemerge[eval]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def literal(name: str) -> str:
    """A name as it is: matplotlib reads a dollar as the beginning of a formula."""
    return name.replace("$", "\\$")
