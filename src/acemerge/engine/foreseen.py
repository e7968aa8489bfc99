"""How much memory a run will take: what it keeps to, and what a plan says before it begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from acemerge.engine.pipeline import WAITING, Batch, batches, lane_slots
from acemerge.planning.costs import budget, in_flight, resident
from acemerge.planning.jobs import Job, Plan
from acemerge.planning.pieces import pieces


def _together(found: Sequence[Batch[Job]], workers: int) -> int | None:
    """The bytes of batches in this order, each load in a lane of its own; None where a lane has no room for them."""
    total = 0
    for load, slots in lane_slots(workers).items():
        costs = [batch.cost for batch in found if batch.load == load]
        if len(costs) > slots + WAITING:
            return None
        total += in_flight(costs, slots)
    return total


def foreseen(plan: Plan, limit: int, workers: int) -> int:
    """The most bytes in flight where everything is read ahead that may be, within the limit or for one batch."""
    pending, most = deque[Batch[Job]](), 0
    for batch in batches((p for job in plan.jobs for p in pieces(job, job.entrywise)), len(plan.experts)):
        found = _together([*pending, batch], workers)
        while pending and (found is None or found > limit):
            pending.popleft()
            found = _together([*pending, batch], workers)
        pending.append(batch)
        most = max(most, found or 0)
    return most


def allowed(plan: Plan, limit: int | None, workers: int) -> int:
    """The bytes that a run may have in flight, idle buffers among them. Raises UsageError as `budget` does."""
    most = budget(plan, limit)
    return min(most, foreseen(plan, most, workers))


def expected_memory(plan: Plan, workers: int = 1) -> int:
    """The bytes that the process takes at most, as it runs without a limit of the user's."""
    return resident(plan) + allowed(plan, None, workers)
