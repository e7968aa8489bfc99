"""Tensors of all layers on one line: `model.layers.0-27.mlp.up_proj.weight`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_FEW = 4  # numbers that are listed, where they are no range


def natural(name: str) -> list[tuple[int, int, str]]:
    """To sort names by: layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def grouped(names: Iterable[str], kind: Callable[[str], Hashable], every: bool = False) -> list[tuple[str, list[str]]]:
    """Names that differ in numbers alone and are of one kind, under one name, in the order of the layers; or each by
    itself.
    """
    found: dict[Hashable, list[str]] = {}
    for name in sorted(names, key=natural):
        found.setdefault(name if every else (_NUMBER.sub("#", name), kind(name)), []).append(name)
    return [(_common(members), members) for members in found.values()]


def _common(names: Sequence[str]) -> str:
    """One name for all: with a range, or a list, in the place of every number that is not the same."""
    columns = iter(zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True))
    return _NUMBER.sub(lambda _: _numbers(sorted(set(next(columns)))), names[0])


def _numbers(found: Sequence[int]) -> str:
    first, last = found[0], found[-1]
    if first == last:
        return f"{first}"
    if len(found) == last - first + 1:
        return f"{first}-{last}"
    return ",".join(map(str, found)) if len(found) <= _FEW else f"{first}..{last}"


def shortened(name: str, width: int) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]
