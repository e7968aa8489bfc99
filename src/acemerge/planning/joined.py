"""Query, key and value projections that are stored apart and merged as one weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from acemerge.errors import UsageError
from acemerge.planning.jobs import Job, Merge

_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_FIRST = re.compile(r"(?:^|(?<=[._]))(" + "|".join(first for first, *_ in _TRIPLES) + r")(?=\.weight$)")


def with_joined(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The jobs with projections that belong together joined; UsageError where there are none."""
    by_name = {job.name: job for job in jobs}
    joined: dict[str, Job] = {}
    for job in jobs:
        parts = _projections(job, by_name)
        for part in parts:
            read, reason = sum(other.bytes_in for other in parts), f"{part.reason}, q, k and v as one"
            joined[part.name] = replace(part, joined=parts, bytes_in=read, reason=reason)
    if not joined:
        what = "no query, key and value are stored apart and merged by one rule that sees matrices"
        raise UsageError("join_qkv", what, "leave it out")
    return tuple(joined.get(job.name, job) for job in jobs)


def _projections(job: Job, by_name: Mapping[str, Job]) -> tuple[Merge, ...]:
    """A layer's three projections, given the first; none where they cannot be one weight."""
    found = _FIRST.search(job.name)
    if found is None:
        return ()
    names = next(triple for triple in _TRIPLES if triple[0] == found[1])
    places = (f"{job.name[: found.start()]}{name}{job.name[found.end() :]}" for name in names)
    parts = [part for part in map(by_name.get, places) if isinstance(part, Merge) and _is_plain(part)]
    kinds = {(part.spec.shape[1], id(part.method), part.weights, part.compute_dtype) for part in parts}
    return tuple(parts) if len(parts) == len(names) and len(kinds) == 1 else ()


def _is_plain(part: Merge) -> bool:
    """A matrix of every expert's own, as it is stored, by a rule that sees matrices and measures nothing."""
    needs, whole = part.method.needs, all(part.sources) and not (part.absent or part.copies or any(part.updates))
    return needs.matrix and needs.calibration is None and len(part.spec.shape) == 2 and whole and not part.transposed
