"""The magnitudes above which a rule keeps a share of the whole model, from two passes over the checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from acemerge.engine.batched import small_job, stacked, stacks
from acemerge.engine.compute import all_task_vectors
from acemerge.engine.work import Loaded, Place, Setting, Values, Walk
from acemerge.errors import CheckpointError
from acemerge.linalg.select import LOWER, UPPER, from_halves, kth_bin, lower_counts, share_of, upper_counts
from acemerge.planning.jobs import ByRule, Plan
from acemerge.planning.pieces import Piece, pieces
from acemerge.shapes import Int, Tensor


@dataclass(frozen=True)
class Pool:
    """The tensors over which a rule of the recipe, by its number, keeps a share; or those of them that are counted."""

    number: int
    keep: float
    jobs: tuple[ByRule, ...]


# By pool, for every expert: how many entries there are for each half of a magnitude's bits.
Counts = Mapping[int, Int[Tensor, "T bins"]]
# By pool, for every expert: the upper half behind which the lower ones are counted. Without it the upper are.
Halves = Mapping[int, Sequence[int]]
Count = Callable[[Sequence[Pool], Halves | None], Counts]


def pools_of(plan: Plan) -> list[Pool]:
    """One for each rule of the recipe that keeps a share: all tensors to which it applies, whatever others keep."""
    found: dict[tuple[int, float], list[ByRule]] = {}
    for job in plan.ruled:
        if job.method.needs.keep is not None:
            found.setdefault((job.pool, job.method.needs.keep), []).append(job)
    return [Pool(number, keep, tuple(jobs)) for (number, keep), jobs in sorted(found.items())]


def with_thresholds(setting: Setting, plan: Plan, count: Count) -> Setting:
    """The setting with the thresholds that the plan's rules need: one per expert for each of its pools.

    Counts are sums of integers: whoever counts what of them, and in whatever order, the thresholds are the same.
    """
    pools = pools_of(plan)
    upper = count(pools, None) if pools else {}
    places = {pool.number: [_place(pool.keep, counts) for counts in upper[pool.number]] for pool in pools}
    halves = {number: [half for half, _ in found] for number, found in places.items()}
    lower = count(pools, halves) if pools else {}
    for number, counts in lower.items():
        if [int(own[half]) for own, half in zip(upper[number], halves[number], strict=True)] != counts.sum(1).tolist():
            what = "the second count of magnitudes is not of the same entries as the first"
            raise CheckpointError("thresholds", what, "let nobody write to the inputs or the output, and start again")
    return replace(setting, thresholds={number: _found(places[number], lower[number]) for number in places})


def _place(keep: float, counts: Int[Tensor, " upper"]) -> tuple[int, int]:
    """The upper half of the magnitude that is looked for, and its rank among those that have it, too."""
    return kth_bin(counts, share_of(keep, int(counts.sum()))) if counts.any() else (0, 1)


def _found(places: Sequence[tuple[int, int]], lower: Int[Tensor, "T lower"]) -> list[float]:
    return [
        from_halves(half, kth_bin(counts, rank)[0]) if counts.any() else 0.0
        for (half, rank), counts in zip(places, lower, strict=True)
    ]


def counting(setting: Setting, walk: Walk) -> Count:
    """Counts here, going through the tensors of one pool after the other."""

    def count(pools: Sequence[Pool], halves: Halves | None) -> Counts:
        return {
            pool.number: _counts(pool, None if halves is None else halves[pool.number], setting, walk) for pool in pools
        }

    return count


def _counts(pool: Pool, halves: Sequence[int] | None, setting: Setting, walk: Walk) -> Int[Tensor, "T bins"]:
    """For every expert the sum of the counts of all its task vectors."""
    # A count knows no tensors: all may be split, unless an expert may have to be left out of one.
    split = setting.recipe.nonfinite == "error"
    totals = torch.zeros(len(setting.labels), UPPER if halves is None else LOWER, dtype=torch.int64)
    work = partial(_counted, setting=setting, halves=halves)
    for counts in walk((piece for job in pool.jobs for piece in pieces(job, split)), work):
        for t, found in counts.items():
            totals[t] += found
    return totals


def _counted(loaded: Loaded[ByRule], place: Place, setting: Setting, halves: Sequence[int] | None) -> dict[int, Tensor]:
    """The counts of some pieces, by expert."""

    def count(t: int, D: Tensor) -> Tensor:
        return (upper_counts(D) if halves is None else lower_counts(D, halves[t])).cpu()

    if len(loaded) == 1 and small_job(loaded[0][0]) is None:
        with _task_vectors(*loaded[0], setting, place) as found:
            return {t: count(t, D) for t, D in found}
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
    return {t: count(t, torch.cat(parts)) for t, parts in gathered.items()}


@contextlib.contextmanager
def _task_vectors(
    piece: Piece[ByRule], values: Values, setting: Setting, place: Place
) -> Iterator[list[tuple[int, Tensor]]]:
    """The experts that are used, and their task vectors as long as the block lasts."""
    experts = len(setting.labels)
    with place.space((experts + 1, *piece.shape), piece.job.compute_dtype) as space:
        _, deltas, _, used = all_task_vectors(piece, values.take((0, piece.job.name)), values, setting, space)
        yield list(zip(used, deltas, strict=True))
