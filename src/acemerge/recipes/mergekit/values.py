"""A parameter's value in a mergekit YAML: a number, a gradient over the layers, or one of these by tensor name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from acemerge.errors import UsageError, nearest
from acemerge.models.depth import LayerStack, tower_layer


@dataclass(frozen=True)
class LayerPosition:
    """A tensor's name, and where its layer is among the layers: 0 for the first and 1 for the last.

    What belongs to no layer, as embeddings, the last norm and the output head, is at 0.
    """

    name: str
    t: float

    @staticmethod
    def of_all(names: Iterable[str], stack: LayerStack | None = None) -> dict[str, LayerPosition]:
        """The places of all tensors of a model; with a stack the layers of each slice are counted by themselves."""
        if stack is not None:
            return {name: LayerPosition(name, _share_of_slice(*stack.slice_of(name), stack)) for name in names}
        found = {name: tower_layer(name) for name in names}
        last: dict[str, int] = {}
        for tower, number in filter(None, found.values()):
            last[tower] = max(last.get(tower, 0), number)
        return {
            name: LayerPosition(name, _share(layer[1], last[layer[0]]) if layer else 0.0)
            for name, layer in found.items()
        }


def _share(number: int, last: int) -> float:
    return number / last if last else 1.0


def _share_of_slice(i: int, number: int | None, stack: LayerStack) -> float:
    return 0.0 if number is None else _share(number, stack.lengths[i] - 1)


@dataclass(frozen=True)
class ParameterValue:
    """`(filter, value)` pairs, the first whose filter is part of the name counts; a value is one or a gradient."""

    cases: tuple[tuple[str | None, tuple[Any, ...]], ...]

    @staticmethod
    def read(value: Any, where: str) -> ParameterValue:
        """From YAML; UsageError for what is no value."""
        cases = value if isinstance(value, list) and any(isinstance(v, dict) for v in value) else [value]
        return ParameterValue(tuple(_case(case, where) for case in cases))

    def at(self, place: LayerPosition) -> Any:
        """The value for a tensor, None where no filter matches."""
        for part, values in self.cases:
            if part is None or part in place.name:
                return _interpolated(values, place.t)
        return None


def varies(setting: ParameterValue) -> bool:
    """Whether it may differ from tensor to tensor."""
    return any(part is not None or len(values) > 1 for part, values in setting.cases)


def _case(case: Any, where: str) -> tuple[str | None, tuple[Any, ...]]:
    if not isinstance(case, dict):
        return None, _values(case, where)
    for key in case:
        if key not in ("filter", "value"):
            raise UsageError(where, f"unknown key {key!r}", nearest(str(key), ["filter", "value"]))
    part = case.get("filter")
    if "value" not in case or not isinstance(part, str | None):
        raise UsageError(where, "not a filter with a value", "write `- {filter: mlp, value: 0.5}`")
    return None if part in (None, "", "*") else part, _values(case["value"], where)


def _values(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        return (_one(value, where),)
    values = tuple(_one(v, where) for v in value)
    if not values or (len(values) > 1 and any(isinstance(v, bool) for v in values)):
        raise UsageError(where, f"{value} is no gradient", "give a list of numbers")
    return values


def _one(value: Any, where: str) -> Any:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)  # YAML takes 1e-5 for a string
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(where, f"{value!r} is no number", "give a number, a list of numbers or filters with values")
    return int(value) if isinstance(value, int) else number


def _interpolated(values: tuple[Any, ...], t: float) -> Any:
    """The gradient's value at t between 0 and 1, linear between its numbers."""
    if len(values) == 1:
        return values[0]
    place = t * (len(values) - 1)
    i = min(int(place), len(values) - 2)
    return values[i] + (values[i + 1] - values[i]) * (place - i)
