"""Text from files and people in Markdown: nothing in it is a link, HTML, or the end of where it stands."""

from __future__ import annotations

import re

from acemerge.errors import printable

# What may begin or end something. Between two letters an underscore does neither.
_MARKS = re.compile(r"[\\`*\[\]<>#|~&$!]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """Text as it is, in a line or a table's cell."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", printable(text))


def code(text: str) -> str:
    """A span of code, whatever the text."""
    shown = printable(text)
    marks = _longer_than_any_in(shown, 1)
    return f"{marks} {shown} {marks}" if "`" in shown else f"{marks}{shown}{marks}"


def fenced(language: str, text: str) -> list[str]:
    """The lines of a block of code."""
    marks = _longer_than_any_in(text, 3)
    return [f"{marks}{language}", text, marks]


def _longer_than_any_in(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
