"""What a rule said of a tensor, once or for each of its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def parts_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a rule says: once, or for every slice or projection."""
    several = record.get("slices") or record.get("projections")
    return several if isinstance(several, list) else [record]


def figure(record: Mapping[str, Any], key: str) -> float | None:
    """A number that the rule gave; the largest where it gave one for each slice."""
    found = [part.get(key) for part in parts_of(record)]
    numbers = [float(x) for x in found if isinstance(x, int | float) and math.isfinite(x)]
    return max(numbers, default=None)


def branch(record: Mapping[str, Any]) -> str | None:
    """ACE's branch, `mixed` where slices differ."""
    found = {str(part["branch"]) for part in parts_of(record) if "branch" in part}
    return None if not found else found.pop() if len(found) == 1 else "mixed"
