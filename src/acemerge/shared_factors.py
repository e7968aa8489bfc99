"""Adapters that were trained with one frozen A: their input side says nothing about their tasks."""

from __future__ import annotations

from collections.abc import Sequence

from acemerge.checkpoints.folder import Checkpoint
from acemerge.jobs import Plan

_SAME = 1e-6


def shared_input_factors(plan: Plan, experts: Sequence[Checkpoint]) -> list[str]:
    """A warning where all experts have one A in some layers, to 1e-6 of its norm; reads the factors A only.

    There `D_t^T D_t = s^2 A^T B_t^T B_t A` has the same row space for every task.
    """
    layers = [job.updates for job in plan.jobs if len(job.updates) > 1 and all(job.updates)]
    count = sum(_is_shared([update.A.name for update in updates if update], experts) for updates in layers)
    if not count:
        return []
    where = f"{count} of {len(layers)} layers" if count < len(layers) else f"all {count} layers that they change"
    return [f"the adapters share A in {where}: input covariances, as of ace, tell nothing about the tasks there"]


def _is_shared(names: Sequence[str], experts: Sequence[Checkpoint]) -> bool:
    first = experts[0].read(names[0]).double()
    for name, expert in zip(names[1:], experts[1:], strict=True):
        A = expert.read(name).double()
        if A.shape != first.shape or not (A - first).norm() <= _SAME * first.norm():
            return False
    return True
