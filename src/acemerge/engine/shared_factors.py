"""Adapters that were trained with one frozen A: their input side says nothing about their tasks."""

from __future__ import annotations

from collections.abc import Sequence

from acemerge.checkpoints.adapter import Update
from acemerge.checkpoints.folder import Checkpoint
from acemerge.linalg.lowrank import share_row_space
from acemerge.planning.finite import is_finite
from acemerge.planning.jobs import Merge, Plan
from acemerge.shapes import Tensor


def shared_input_factors(plan: Plan, experts: Sequence[Checkpoint]) -> list[str]:
    """A warning where a rule looks at inputs and the experts' A span one space; reads the factors A only.

    There `D_t^T D_t = s^2 A^T B_t^T B_t A` has the same row space for every task, and the rule gets the transposes.
    """
    layers = [job for job in plan.merged if job.factored and job.method.needs.input_side]
    several = [(job, found) for job in layers if len(found := _changing(job)) > 1]
    shared = [job for job, found in several if _is_shared(job, found, experts)]
    if not shared:
        return []
    where = f"{len(shared)} of {len(several)} layers" if len(shared) < len(several) else f"all {len(several)} layers"
    rules = ", ".join(sorted({job.rule for job in shared}))
    what = "their inputs tell nothing about the tasks there"
    return [f"the adapters share A in {where} that {rules} merges: {what}, and the output side is used"]


def _changing(job: Merge) -> list[tuple[int, Update]]:
    """The experts that count, and their updates: one of weight zero hides nothing."""
    return [(i, update) for i, update in enumerate(job.updates) if update and job.weights[i]]


def _is_shared(job: Merge, found: Sequence[tuple[int, Update]], experts: Sequence[Checkpoint]) -> bool:
    sides = [_input_side(job, update, experts[i]) for i, update in found]
    return all(map(is_finite, sides)) and share_row_space(tuple(sides))


def _input_side(job: Merge, update: Update, expert: Checkpoint) -> Tensor:
    """The factor (r, in) on the side that the rule takes for the inputs."""
    if update.transposed == job.transposed:
        return expert.read(update.A.name)
    return expert.read(update.B.name).T
