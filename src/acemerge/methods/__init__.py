"""The rules by name. Adding one is a class in a file of its family and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from acemerge.errors import UsageError, nearest
from acemerge.methods.ace import Ace
from acemerge.methods.base import LayerResult, Method
from acemerge.methods.elementwise import Average, TaskArithmetic

__all__ = ["METHODS", "LayerResult", "Method", "make", "register"]

METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Add a rule under its `name`; usable as a class decorator."""
    METHODS[cls.name] = cls
    return cls


for _rule in (Average, TaskArithmetic, Ace):
    register(_rule)


def make(name: str, params: Mapping[str, Any]) -> Method:
    """The rule `name` with validated parameters; UsageError names a wrong name, key or value."""
    if name not in METHODS:
        raise UsageError(f"method {name!r}", "no such rule", nearest(name, list(METHODS)))
    cls = METHODS[name]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in params:
        if key not in known:
            raise UsageError(f"method {name!r}", f"no parameter {key!r}", nearest(key, known))
    try:
        rule: Method = TypeAdapter(cls).validate_python(dict(params))
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{first['msg'].lower()}, not {first['input']!r}"
        raise UsageError(f"method {name!r}, parameter {where!r}", what, f"see `acemerge methods {name}`") from None
    return rule
