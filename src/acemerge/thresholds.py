"""The magnitudes above which a rule keeps a share of the whole model, from two passes over the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from acemerge.compute import Inputs, task_vectors
from acemerge.linalg.select import from_halves, locate, lower_counts, share_of, upper_counts
from acemerge.plan import Job, Plan
from acemerge.shapes import Int, Tensor

# Counts for one task vector of the t-th expert.
_Count = Callable[[int, Tensor], Tensor]


def with_thresholds(inputs: Inputs, plan: Plan, workers: int = 1) -> Inputs:
    """The inputs with the thresholds that the plan's rules need: one per expert for each share kept.

    A share is taken over all tensors whose rule keeps it. No more than one tensor per worker is held.
    """
    shares = {job.method.needs.keep for job in plan.jobs if job.method} - {None}
    found = {}
    for keep in sorted(share for share in shares if share is not None):
        jobs = [job for job in plan.jobs if job.method and job.method.needs.keep == keep]
        found[keep] = _thresholds(keep, jobs, inputs, workers)
    return replace(inputs, thresholds=found)


def _thresholds(keep: float, jobs: Sequence[Job], inputs: Inputs, workers: int) -> list[float]:
    upper = _counts(jobs, inputs, workers, lambda _, D: upper_counts(D))
    halves = [locate(counts, share_of(keep, int(counts.sum()))) if counts.any() else (0, 1) for counts in upper]
    lower = _counts(jobs, inputs, workers, lambda t, D: lower_counts(D, halves[t][0]))
    return [
        from_halves(high, locate(counts, rank)[0]) if counts.any() else 0.0
        for (high, rank), counts in zip(halves, lower, strict=True)
    ]


def _counts(jobs: Sequence[Job], inputs: Inputs, workers: int, count: _Count) -> Int[Tensor, "T bins"]:
    """For every expert the sum of the counts of all its task vectors."""

    def of_job(job: Job) -> dict[int, Tensor]:
        deltas, used = task_vectors(job, inputs.base.read(job.name), inputs)
        return {t: count(t, D).cpu() for t, D in zip(used, deltas, strict=True)}

    totals: dict[int, Tensor] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="acemerge-thresholds") as pool:
        for counts in pool.map(of_job, jobs):
            for t, found in counts.items():
                totals[t] = found if t not in totals else totals[t] + found
    nothing = torch.zeros_like(next(iter(totals.values())))
    return torch.stack([totals.get(t, nothing) for t in range(len(inputs.experts))])
