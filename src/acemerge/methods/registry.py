"""The rules by name, and building one from a name and parameters."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from acemerge.errors import UsageError, nearest, shown
from acemerge.methods.base import Method, parameter_fields
from acemerge.methods.installed import installed, load

METHODS: dict[str, type[Method]] = {}
AnyMethod = str | Mapping[str, Any] | Method  # a rule by its name, as a table of `name` and parameters, or itself
M = TypeVar("M", bound=type[Method])
_RECOMMENDED = "kron_auto"  # docs/beyond.md has how it was chosen
DEFAULT = "auto"  # the rule of a merge that names none, as signatures spell it


def register(cls: M) -> M:
    """Add a rule under its `name`; usable as a class decorator. UsageError where there is one of that name."""
    if cls.name == "auto" or METHODS.get(cls.name, cls) is not cls:
        raise UsageError(f"method {cls.name!r}", "there is a rule of this name", "give yours another `name`")
    METHODS[cls.name] = cls
    return cls


def rule_name(name: str) -> str:
    """The name itself, or what `auto` stands for in this version."""
    return _RECOMMENDED if name == "auto" else name


def rule_class(name: str) -> type[Method]:
    """The class of a rule, also of one that another package has; UsageError where there is none."""
    name = rule_name(name)
    if name not in METHODS:
        offered = installed()
        if name not in offered:
            raise UsageError(f"method {shown(name)}", "no such rule", nearest(name, [*METHODS, *offered]))
        register(load(offered[name]))
    return METHODS[name]


def check_names(method: AnyMethod, given: Mapping[str, Any], options: list[str]) -> None:
    """UsageError for a name that is no parameter of the rule, where one of the caller's `options` is nearer."""
    name = as_table(method).get("name")
    known = [field.name for field in parameter_fields(rule_class(name))] if isinstance(name, str) else []
    for key in (key for key in given if key not in known):
        close = difflib.get_close_matches(key, [*known, *options], n=1)
        if close and close[0] in options:
            raise UsageError(f"option {key!r}", "there is none of that name", f"did you mean `{close[0]}`?")


def load_installed() -> list[UsageError]:
    """Register every rule that an installed package has, and return what is wrong with those that do not load."""
    failures = []
    for name, entry in installed().items():
        if name not in METHODS:
            try:
                register(load(entry))
            except UsageError as failure:
                failures.append(failure)
    return failures


def as_table(method: AnyMethod) -> dict[str, Any]:
    """A rule as a recipe holds it: `name` and parameters."""
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, Mapping):
        return dict(method)
    if not isinstance(method, Method):
        raise _no_rule(method)
    return {"name": method.name, **{field.name: getattr(method, field.name) for field in parameter_fields(method)}}


def as_rule(method: AnyMethod, params: Mapping[str, Any]) -> Method:
    """The rule itself, with these parameters over those that it has; UsageError as of `make`."""
    if isinstance(method, Method) and not (params or isinstance(method, type)):
        return method
    table = {**as_table(method), **params}
    if not isinstance(table.get("name"), str):
        raise _no_rule(method)
    return make(table.pop("name"), table)


def _no_rule(method: object) -> UsageError:
    return UsageError("method", f"{shown(method)} names no rule", "give its `name`, as {'name': 'ace', 'eps': 1e-4}")


@functools.cache
def _adapter(cls: type[Method]) -> TypeAdapter[Method]:
    return TypeAdapter(cls)


def make(name: str, params: Mapping[str, Any]) -> Method:
    """The rule `name` with validated parameters; UsageError names a wrong name, key or value."""
    cls = rule_class(name)
    name = cls.name
    known = [field.name for field in parameter_fields(cls)]
    for key in params:
        if key not in known:
            raise UsageError(f"method {name!r}", f"no parameter {key!r}", nearest(key, known))
    try:
        rule: Method = _adapter(cls).validate_python(dict(params))
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f"method {name!r}, parameter {where!r}" if where else f"method {name!r}"
        what = f"{first['msg'].removeprefix('Value error, ').lower()}, not {shown(first['input'])}"
        raise UsageError(place, what, f"see `acemerge methods {name}`") from None
    return rule
