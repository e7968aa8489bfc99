"""Parts of a merge that several machines share: which of the output's files each of them writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from acemerge.checkpoints.unfinished import SHARDS
from acemerge.errors import UsageError
from acemerge.planning.jobs import Plan

_PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", re.ASCII)
_FOLDER = re.compile(r"([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})", re.ASCII)


@dataclass(frozen=True, order=True)
class Part:
    """One of so many parts, counted from 1."""

    of: int
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """Where in the output folder it keeps its notes."""
        return f"{SHARDS}/{self.number}-of-{self.of}"


def parse_part(text: Any) -> Any:
    """`K/N` as a part; ValueError where it is none. What is no text is left as it is."""
    if not isinstance(text, str):
        return text
    found = _PART.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError("is no part")
    return Part(int(found[2]), int(found[1]))


def part_of_folder(name: str) -> Part | None:
    """The part whose notes are in a folder of this name."""
    found = _FOLDER.fullmatch(name)
    return Part(int(found[2]), int(found[1])) if found and int(found[1]) <= int(found[2]) else None


def spread(costs: Sequence[float], parts: int) -> list[int]:
    """For each cost the part that gets it: the largest first, each to the part that has least so far.

    Where several are alike, the first. With as many costs as parts, or more, no part is empty.
    """
    loads, counts, given = [0.0] * parts, [0] * parts, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(parts), key=lambda k: (loads[k], counts[k]))
        loads[least] += costs[i]
        counts[least] += 1
        given[i] = least + 1
    return given


def check_parts(plan: Plan, where: str, part: Part | None, files: int) -> None:
    """UsageError where the plan, which writes so many files of weights, cannot be done in parts, or not in so many.

    `where` is the option that wants it to be.
    """
    if plan.is_adapter:
        raise UsageError(where, "an adapter (--as-lora) is one file", f"leave out {where.split()[0]}")
    measured = sorted({job.rule for job in plan.ruled if job.method.needs.calibration is not None})
    if measured:
        what = f"{measured[0]} measures the experts on data, which parts do not share"
        raise UsageError(where, what, f"leave out {where.split()[0]}, or use a rule without calibration")
    if part is not None and part.of > files:
        what = f"the output has {files} file{'s' * (files > 1)} of weights, fewer than {part.of} parts"
        raise UsageError(where, what, "use fewer parts, or a smaller --max-shard-size in all of them")
