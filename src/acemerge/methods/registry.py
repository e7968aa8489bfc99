"""The rules by name, and building one from a name and parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from acemerge.errors import UsageError, nearest
from acemerge.methods.base import Method

METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])
_RECOMMENDED = "kron_auto"  # docs/beyond.md has how it was chosen


def register(cls: M) -> M:
    """Add a rule under its `name`; usable as a class decorator. UsageError where there is one of that name."""
    if cls.name == "auto" or METHODS.get(cls.name, cls) is not cls:
        raise UsageError(f"method {cls.name!r}", "there is a rule of this name", "give yours another `name`")
    METHODS[cls.name] = cls
    return cls


def rule_name(name: str) -> str:
    """The name itself, or what `auto` stands for in this version."""
    return _RECOMMENDED if name == "auto" else name


@functools.cache
def _adapter(cls: type[Method]) -> TypeAdapter[Method]:
    return TypeAdapter(cls)


def make(name: str, params: Mapping[str, Any]) -> Method:
    """The rule `name` with validated parameters; UsageError names a wrong name, key or value."""
    name = rule_name(name)
    if name not in METHODS:
        raise UsageError(f"method {name!r}", "no such rule", nearest(name, list(METHODS)))
    cls = METHODS[name]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in params:
        if key not in known:
            raise UsageError(f"method {name!r}", f"no parameter {key!r}", nearest(key, known))
    try:
        rule: Method = _adapter(cls).validate_python(dict(params))
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f"method {name!r}, parameter {where!r}" if where else f"method {name!r}"
        what = f"{first['msg'].removeprefix('Value error, ').lower()}, not {first['input']!r}"
        raise UsageError(place, what, f"see `acemerge methods {name}`") from None
    return rule
