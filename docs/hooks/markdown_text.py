"""Plain text and docstrings as Markdown."""

from __future__ import annotations

import re

_CODE = re.compile(r"(`[^`]*`)")
_ARXIV = re.compile(r"arXiv\s(\d{4}\.\d{4,5})")


def from_docstring(doc: str) -> str:
    """Its indented formulas are code to Markdown too; its prose may hold signs that are none."""
    return "\n\n".join(part if part.startswith("    ") else prose(part) for part in doc.split("\n\n"))


def prose(text: str) -> str:
    """Text whose code is between backticks; papers on arXiv become links."""
    parts = _CODE.split(text)
    plain = (re.sub(r"([<>*_|\[\]])", r"\\\1", part) for part in parts[::2])
    linked = [_ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", part) for part in plain]
    return "".join(a + b for a, b in zip(linked, [*parts[1::2], ""], strict=True))


def row(*cells: str) -> str:
    """A row of a table. A bar within code ends no cell, and `prose` escapes all others."""
    return f"| {' | '.join(cells)} |"
