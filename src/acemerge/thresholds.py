"""The magnitudes above which a rule keeps a share of the whole model, from two passes over the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from acemerge.compute import task_vectors
from acemerge.jobs import Job, Plan, pieces
from acemerge.linalg.select import from_halves, locate, lower_counts, share_of, upper_counts
from acemerge.shapes import Int, Tensor
from acemerge.work import Loaded, Place, Setting, Walk

# Counts for task vectors of the t-th expert.
_Count = Callable[[int, Tensor], Tensor]


def with_thresholds(setting: Setting, plan: Plan, walk: Walk) -> Setting:
    """The setting with the thresholds that the plan's rules need: one per expert for each share kept.

    A share is taken over all tensors whose rule keeps it.
    """
    shares = {job.method.needs.keep for job in plan.jobs if job.method} - {None}
    found = {}
    for keep in sorted(share for share in shares if share is not None):
        jobs = [job for job in plan.jobs if job.method and job.method.needs.keep == keep]
        found[keep] = _thresholds(keep, jobs, setting, walk)
    return replace(setting, thresholds=found)


def _thresholds(keep: float, jobs: Sequence[Job], setting: Setting, walk: Walk) -> list[float]:
    upper = _counts(jobs, setting, walk, lambda _, D: upper_counts(D))
    halves = [locate(counts, share_of(keep, int(counts.sum()))) if counts.any() else (0, 1) for counts in upper]
    lower = _counts(jobs, setting, walk, lambda t, D: lower_counts(D, halves[t][0]))
    return [
        from_halves(high, locate(counts, rank)[0]) if counts.any() else 0.0
        for (high, rank), counts in zip(halves, lower, strict=True)
    ]


def _counts(jobs: Sequence[Job], setting: Setting, walk: Walk, count: _Count) -> Int[Tensor, "T bins"]:
    """For every expert the sum of the counts of all its task vectors."""
    experts = len(setting.labels)
    # A count knows no tensors: all may be split, unless an expert may have to be left out of one.
    split = setting.recipe.nonfinite == "error"

    def of_pieces(loaded: Loaded, place: Place) -> dict[int, Tensor]:
        gathered: dict[int, list[Tensor]] = {}
        for piece, values in loaded:
            with place.space((experts + 1, *piece.shape), piece.job.compute_dtype) as space:
                W0 = space[experts].copy_(values.take((0, piece.job.name)))
                deltas, _, used = task_vectors(piece, values, setting, W0, space[:experts])
                if len(loaded) == 1:
                    return {t: count(t, D).cpu() for t, D in zip(used, deltas, strict=True)}
                for t, D in zip(used, deltas, strict=True):  # small tensors: counted together, out of the space
                    gathered.setdefault(t, []).append(D.flatten().clone())
        return {t: count(t, torch.cat(parts)).cpu() for t, parts in gathered.items()}

    totals: dict[int, Tensor] = {}
    for counts in walk((piece for job in jobs for piece in pieces(job, split)), of_pieces):
        for t, found in counts.items():
            totals[t] = found if t not in totals else totals[t].add_(found)
    nothing = torch.zeros_like(next(iter(totals.values())))
    return torch.stack([totals.get(t, nothing) for t in range(experts)])
