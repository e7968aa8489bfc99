"""Crossed parameters: every pair of values in `make test`, the rest of the product in `make torture`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

_Param = type(pytest.param())
Row = tuple[int, ...]


def named(values: Mapping[str, Any]) -> list[Any]:
    """The values of a table, each under its name."""
    return [pytest.param(value, id=name) for name, value in values.items()]


def crossed(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by all of `name=values`; a key may name several parameters, as `"rule,params"`.

    A fault mostly shows with one value or with two together, so that rows which hold each two of them once find it;
    a value marked as torture is not one of those.
    """
    return _parametrized(axes, pairwise)


def spread(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """As `crossed`, where parameters have little to do with each other: every value once, not every pair."""
    return _parametrized(axes, lambda sizes: [tuple(i % n for n in sizes) for i in range(max(sizes))])


def _parametrized(
    axes: Mapping[str, Iterable[Any]], choose: Callable[[Sequence[int]], list[Row]]
) -> pytest.MarkDecorator:
    columns = [[v if isinstance(v, _Param) else pytest.param(v, id=str(v)) for v in values] for values in axes.values()]
    often = [[i for i, value in enumerate(column) if not value.marks] for column in columns]
    chosen = {tuple(often[a][i] for a, i in enumerate(row)) for row in choose([len(values) for values in often])}
    cases = []
    for row in product(*(range(len(column)) for column in columns)):
        held = [column[i] for column, i in zip(columns, row, strict=True)]
        marks = [mark for value in held for mark in value.marks] or ([] if row in chosen else [pytest.mark.torture])
        cases.append(
            pytest.param(
                *(v for value in held for v in value.values), id="-".join(str(v.id) for v in held), marks=marks
            )
        )
    return pytest.mark.parametrize(",".join(axes), cases)


def pairwise(sizes: Sequence[int]) -> list[Row]:
    """Few rows of one number per size in which every two columns hold every two of their numbers."""
    order = sorted(range(len(sizes)), key=lambda a: -sizes[a])
    rows: list[list[int]] = [[]]
    for a in order:
        rows = _grown(rows, [sizes[b] for b in order[: len(rows[0])]], sizes[a])
    place = {a: i for i, a in enumerate(order)}
    return [tuple(row[place[a]] for a in range(len(sizes))) for row in rows]


def _grown(rows: list[list[int]], sizes: list[int], size: int) -> list[list[int]]:
    """One more column, whose number in each row is the one that is new beside the most of the others."""
    if len(sizes) < 2:
        return [[*row, value] for row in rows for value in range(size)]
    missing = {(b, old, new) for b, n in enumerate(sizes) for old in range(n) for new in range(size)}
    grown = []
    for i, row in enumerate(rows):
        turn = [(i + sum(row) + k) % size for k in range(size)]  # where none is better, not always the first
        best = max(turn, key=lambda new: sum((b, old, new) in missing for b, old in enumerate(row)))
        missing -= {(b, old, best) for b, old in enumerate(row)}
        grown.append([*row, best])
    while missing:
        new = min(missing)[2]
        row = [next((o for o in range(n) if (b, o, new) in missing), 0) for b, n in enumerate(sizes)]
        missing -= {(b, old, new) for b, old in enumerate(row)}
        grown.append([*row, new])
    return grown


def pairs(rows: Iterable[Row]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """Every two numbers that stand together in a row, each with its column."""
    return {((a, row[a]), (b, row[b])) for row in rows for a, b in combinations(range(len(row)), 2)}
