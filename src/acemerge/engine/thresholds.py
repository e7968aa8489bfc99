"""The magnitudes above which a rule keeps a share of the whole model, from two passes over the checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from acemerge.engine.batched import small_job, stacked, stacks
from acemerge.engine.compute import all_task_vectors
from acemerge.engine.work import Loaded, Place, Setting, Values, Walk
from acemerge.linalg.select import from_halves, kth_bin, lower_counts, share_of, upper_counts
from acemerge.planning.jobs import ByRule, Plan
from acemerge.planning.pieces import Piece, pieces
from acemerge.shapes import Int, Tensor

# Counts for task vectors of the t-th expert.
_Count = Callable[[int, Tensor], Tensor]


def with_thresholds(setting: Setting, plan: Plan, walk: Walk) -> Setting:
    """The setting with the thresholds that the plan's rules need: one per expert for each rule of the recipe that keeps
    a share. It is taken over all tensors to which this rule applies, whatever others keep.
    """
    pools: dict[tuple[int, float], list[ByRule]] = {}
    for job in plan.ruled:
        if job.method.needs.keep is not None:
            pools.setdefault((job.pool, job.method.needs.keep), []).append(job)
    found = {pool: _thresholds(keep, jobs, setting, walk) for (pool, keep), jobs in sorted(pools.items())}
    return replace(setting, thresholds=found)


def _thresholds(keep: float, jobs: Sequence[ByRule], setting: Setting, walk: Walk) -> list[float]:
    upper = _counts(jobs, setting, walk, lambda _, D: upper_counts(D))
    halves = [kth_bin(counts, share_of(keep, int(counts.sum()))) if counts.any() else (0, 1) for counts in upper]
    lower = _counts(jobs, setting, walk, lambda t, D: lower_counts(D, halves[t][0]))
    return [
        from_halves(high, kth_bin(counts, rank)[0]) if counts.any() else 0.0
        for (high, rank), counts in zip(halves, lower, strict=True)
    ]


def _counts(jobs: Sequence[ByRule], setting: Setting, walk: Walk, count: _Count) -> Int[Tensor, "T bins"]:
    """For every expert the sum of the counts of all its task vectors."""
    experts = len(setting.labels)
    # A count knows no tensors: all may be split, unless an expert may have to be left out of one.
    split = setting.recipe.nonfinite == "error"

    def of_pieces(loaded: Loaded[ByRule], place: Place) -> dict[int, Tensor]:
        if len(loaded) == 1 and small_job(loaded[0][0]) is None:
            with _task_vectors(*loaded[0], setting, place) as found:
                return {t: count(t, D).cpu() for t, D in found}
        gathered: dict[int, list[Tensor]] = {}  # small tensors: counted together
        for members in stacks([piece for piece, _ in loaded]):
            parts = [loaded[i] for i in members]
            stack = None if small_job(parts[0][0]) is None else stacked(parts, place)
            if stack is not None and stack.n.isfinite().all():
                for t, D in enumerate(stack.deltas.unbind(1)):
                    gathered.setdefault(t, []).append(D.flatten())
                continue
            for part in parts:
                with _task_vectors(*part, setting, place) as found:
                    for t, D in found:
                        gathered.setdefault(t, []).append(D.flatten().clone())  # out of the space
        return {t: count(t, torch.cat(parts)).cpu() for t, parts in gathered.items()}

    totals: dict[int, Tensor] = {}
    for counts in walk((piece for job in jobs for piece in pieces(job, split)), of_pieces):
        for t, found in counts.items():
            totals[t] = found if t not in totals else totals[t].add_(found)
    nothing = torch.zeros_like(next(iter(totals.values())))
    return torch.stack([totals.get(t, nothing) for t in range(experts)])


@contextlib.contextmanager
def _task_vectors(
    piece: Piece[ByRule], values: Values, setting: Setting, place: Place
) -> Iterator[list[tuple[int, Tensor]]]:
    """The experts that are used, and their task vectors as long as the block lasts."""
    experts = len(setting.labels)
    with place.space((experts + 1, *piece.shape), piece.job.compute_dtype) as space:
        _, deltas, _, used = all_task_vectors(piece, values.take((0, piece.job.name)), values, setting, space)
        yield list(zip(used, deltas, strict=True))
