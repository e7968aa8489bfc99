"""A rule that works around another one, which it names by `over`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from acemerge.errors import UsageError
from acemerge.methods.base import Method
from acemerge.methods.registry import as_rule


def inner_rule(over: str | Mapping[str, Any]) -> Method:
    """A rule from its name, or from a table of `name` and parameters, with a scale of 1."""
    if not isinstance(over, str) and "scale" in over:
        raise UsageError("over", "the rule inside has a scale", "give the scale to the rule around it")
    return as_rule(over, {"scale": 1.0})


def accepted_by(inner: Callable[[str | dict[str, Any]], object]) -> AfterValidator:
    """A check of `over` by what makes the rule of it: whatever that refuses is no value."""

    def check(over: str | dict[str, Any]) -> str | dict[str, Any]:
        inner(over)
        return over

    return AfterValidator(check)


Over = Annotated[
    str | dict[str, Any], accepted_by(inner_rule), Field(description="the rule inside, by name or as a table")
]
