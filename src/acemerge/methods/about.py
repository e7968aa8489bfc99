"""What a rule says of itself: to be printed, and to be asked for."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from acemerge.methods.base import Method


@dataclass(frozen=True)
class Parameter:
    """A parameter of a rule: what it means, and the values to choose from where these are few."""

    name: str
    default: Any
    meaning: str
    choices: tuple[Any, ...] = ()


def summary(rule: type[Method]) -> str:
    """The first paragraph of its description."""
    return " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())


def parameters(rule: type[Method]) -> list[Parameter]:
    """Its parameters in their order."""
    plain, described = get_type_hints(rule), get_type_hints(rule, include_extras=True)
    return [
        Parameter(field.name, field.default, _meaning(described[field.name]), _choices(plain[field.name]))
        for field in dataclasses.fields(rule)  # type: ignore[arg-type]
    ]


def _meaning(hint: Any) -> str:
    about = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, FieldInfo)]
    return (about[0].description or "") if about else ""


def _choices(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (False, True)
    return get_args(hint) if get_origin(hint) is Literal else ()
