"""What a rule says of itself: its parameters and its docstring, for the terminal and the documentation."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

from pydantic.fields import FieldInfo

from acemerge.methods.base import Method


def docstring(rule: type[Method]) -> str:
    """The formula, its source and every departure from it, without indentation."""
    return inspect.getdoc(rule) or ""


def first_sentence(rule: type[Method]) -> str:
    """What the rule does, in one line."""
    return " ".join(docstring(rule).split("\n\n")[0].split())


def parameters(rule: type[Method]) -> list[tuple[str, Any, str]]:
    """Name, default and meaning of each parameter."""
    hints = get_type_hints(rule, include_extras=True)
    rows = []
    for parameter in dataclasses.fields(rule):  # type: ignore[arg-type]
        about = [m for m in getattr(hints[parameter.name], "__metadata__", ()) if isinstance(m, FieldInfo)]
        rows.append((parameter.name, parameter.default, (about[0].description or "") if about else ""))
    return rows
