"""Small pieces that are alike, worked on as one stack: on one of them a call of torch's takes as long as its work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from acemerge.engine.applying import apply_rule, rule_layer
from acemerge.engine.compute import Computed, compute
from acemerge.engine.unfolding import as_seen, as_stored
from acemerge.engine.work import Loaded, Place, Setting
from acemerge.linalg.device import with_host
from acemerge.linalg.gram import energies
from acemerge.methods import LayerStats, Method, Together, expert_seeds
from acemerge.methods.stats import on_host
from acemerge.output.records import about
from acemerge.planning.finite import all_rounded
from acemerge.planning.jobs import Job, Merge
from acemerge.planning.pieces import Piece
from acemerge.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Stack:
    """P small pieces that are alike: their bases, task vectors and energies in the compute type."""

    W0: Float[Tensor, "P *shape"]
    deltas: Float[Tensor, "P T *shape"]
    n: Float[Tensor, "P T"]

    def part(self, chosen: Int[Tensor, " p"]) -> Stack:
        """Some of them."""
        if len(chosen) == len(self.W0):
            return self
        return Stack(self.W0[chosen], self.deltas[chosen], self.n[chosen])


def compute_all(loaded: Loaded[Job], setting: Setting, place: Place) -> list[Computed]:
    """Merge pieces, in their order. What a piece becomes does not depend on the others."""
    done: dict[int, Computed] = {}
    for members in stacks([piece for piece, _ in loaded]):
        parts = [loaded[i] for i in members]
        jobs = [job for piece, _ in parts if (job := small_job(piece)) is not None]
        if jobs:
            done.update(zip(members, _together(jobs, parts, setting, place), strict=True))
        else:
            done.update((i, compute(*part, setting, place)) for i, part in zip(members, parts, strict=True))
    return [done[i] for i in range(len(loaded))]


def stacks(pieces: Sequence[Piece[Job]]) -> Iterator[list[int]]:
    """The numbers of the pieces, those together that make a stack of small size; others by themselves."""
    groups: dict[object, list[int]] = {}
    for i, piece in enumerate(pieces):
        job = small_job(piece)
        groups.setdefault(i if job is None else _kind(job), []).append(i)
    for members in groups.values():
        most = pieces[members[0]].stack
        for start in range(0, len(members), most):
            yield members[start : start + most]


def small_job(piece: Piece[Job]) -> Merge | None:
    """The job of a piece that is small and has nothing to it but a base, experts and a rule."""
    job = piece.job
    if piece.load != "tiny" or piece.rows is not None or not isinstance(job, Merge) or job.makes_masks:
        return None
    if job.factors is not None or job.method.needs.calibration:  # of an adapter; or with measurements of its own
        return None
    return job if all(job.sources) and not (any(job.updates) or job.copies or job.fused or job.joined) else None


def _kind(job: Merge) -> tuple[object, ...]:
    seen = job.groups, job.transposed
    return job.spec.shape, job.spec.dtype, job.compute_dtype, id(job.method), job.weights, seen


def stacked(parts: Loaded[Job], place: Place) -> Stack:
    """The pieces' task vectors, whether or not they are finite."""
    job = parts[0][0].job
    W0, *experts = (
        torch.stack([values.take(piece.job.inputs[model]) for piece, values in parts]).to(
            place.device, job.compute_dtype
        )
        for model in range(1 + len(job.sources))
    )
    deltas = torch.stack(experts, 1).sub_(W0[:, None])
    return Stack(W0, deltas, energies(deltas.flatten(0, 1)).view(deltas.shape[:2]))


def _together(jobs: Sequence[Merge], parts: Loaded[Job], setting: Setting, place: Place) -> list[Computed]:
    """A stack by its rule. What is out of the ordinary goes by itself: there it gets its name and its cure."""
    started = time.perf_counter()
    method = jobs[0].method
    made: dict[int, Computed] = {}
    # RuntimeError and MemoryError: torch's words for no convergence and for no memory
    with contextlib.suppress(RuntimeError, MemoryError), with_host(place.device) as host:
        stack = stacked(parts, place)
        moved = (stack.n > 0).any(1) | method.needs.moves_equals
        plain = (moved & stack.n.isfinite().all(1)).nonzero().flatten()
        chosen, numbers = stack.part(plain), plain.tolist()
        merged = _merged(method, chosen, [jobs[i] for i in numbers], setting)
        seconds = (time.perf_counter() - started) / max(1, len(numbers))
        before = energies(chosen.W0).tolist()
        for i, n, W, (value, stats, energy) in zip(numbers, chosen.n.tolist(), before, merged, strict=True):
            stats = on_host(stats, host.helped)
            record = replace(about(jobs[i]), stats=stats, energies=tuple(n), base_energy=W, merged_energy=energy)
            record = replace(record, seconds=seconds)
            made[i] = Computed((value,), record)
    return [made[i] if i in made else compute(*part, setting, place) for i, part in enumerate(parts)]


def _merged(
    method: Method, stack: Stack, jobs: Sequence[Merge], setting: Setting
) -> list[tuple[Tensor, LayerStats, float]]:
    """The merged weights in their output type, what the rule says of each, and the energy of the merged update."""
    if not jobs:
        return []
    W0, deltas = as_seen(jobs[0], stack.W0), as_seen(jobs[0], stack.deltas)
    common = rule_layer(jobs[0], range(deltas.shape[1]), setting, W0[0])
    layers = [
        replace(common, seeds=expert_seeds(setting.recipe.seed, job.name, range(deltas.shape[1])), base=base)
        for job, base in zip(jobs, W0 if method.needs.wants_base else [None] * len(W0), strict=True)
    ]
    if isinstance(method, Together) and not (method.needs.matrix and deltas.ndim > 4):
        results = method.merge_together(deltas, layers)
    else:
        results = [apply_rule(method, D, layer) for D, layer in zip(deltas, layers, strict=True)]
    values = torch.stack([result.delta for result in results])
    lengths = energies(values).tolist()
    values.add_(W0)
    rounded = all_rounded(as_stored(jobs[0], values), jobs)
    return [(v, result.stats, energy) for v, result, energy in zip(rounded, results, lengths, strict=True)]
