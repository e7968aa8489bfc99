"""What a plan will take: operations, and memory for what is in flight at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from acemerge.errors import UsageError
from acemerge.methods.base import Needs
from acemerge.methods.elementwise import Average, Blocks
from acemerge.methods.spectral import DECOMPOSITION
from acemerge.planning.jobs import ByRule, Job, Keep, Merge, MergeByToken, Plan
from acemerge.planning.pieces import Piece, pieces
from acemerge.recipes.recipe import SELF
from acemerge.tasks.own_text import TEXTS, TOKENS

# The process itself: code, libraries, their threads and what an allocator keeps.
_PROCESS = 315_000_000
# What it notes, of tens of thousands of small tensors more than they have: of every tensor that is read its place and
# its hash, of every one that is made its job, what its rule said and their words in the manifest.
_OF_INPUT, _OF_TENSOR = 1_300, 7_000
# Beside the largest tensor's task vectors; the process's own is part of it.
_ALLOWANCE = 500_000_000
# Factors of all experts of a mixture are kept for the next ones: so many times those of one matrix, for an expert has
# matrices with other factors, of up to twice as many bytes.
SHARED = 3
# What the C library keeps of what rules have freed, in pieces that it does not join: so much of each tensor, which is
# no use to the next one, up to this and to what one works in. Blocks that follow one another leave none.
_KEPT_OF_EACH, _KEPT = 10_000_000, 50_000_000
# While magnitudes of one expert are counted, whatever their number: some blocks of them.
_COUNTED = 8 << 20


@dataclass(frozen=True)
class Cost:
    """Bytes of a piece: `waiting` with its inputs read, `working` at the peak of its computation, `written` of the
    finished piece. `buffers` of those at the peak lie in buffers that serve again, the inputs among them.
    """

    waiting: int
    working: int
    written: int
    buffers: int = 0


def cost(piece: Piece[Job], experts: int) -> Cost:
    """The inputs; and with them, for a rule, T task vectors and what the rule works in, the result included.

    An expert's own values are let go of when its task vector is there, but for the jobs beside it.
    """
    if piece.beside:
        each = [cost(own, experts) for own in piece.each]
        waiting, written = max(c.waiting for c in each), sum(c.written for c in each)
        kept = max(_known_entries(own, experts) for own in piece.each) * torch.float64.itemsize
        most = max(each, key=lambda c: c.working)
        return Cost(waiting, waiting + most.working + kept + written, written, most.buffers)
    job, waiting, written = piece.job, piece.bytes_in, bytes_written(piece)
    if isinstance(job, Merge) and job.joined:  # all of the weight is made, and its own rows are written
        whole_cost = cost(Piece(job.as_one), experts)
        return Cost(waiting, whole_cost.working + written, written, whole_cost.buffers)
    shared = SHARED * sum(factor.nbytes for factor in job.shared.values()) if isinstance(job, Merge) else 0
    buffers = waiting
    if isinstance(job, Keep):
        beside = job.widens * 4 * piece.count
    elif isinstance(job, Merge) and job.keeps_low_rank:
        # W_0 in the compute type takes the merged update, unless that stays factors.
        whole = piece.count * job.compute_dtype.itemsize if job.factors is None else 0
        beside = whole + _low_rank_entries(job, experts) * torch.float64.itemsize
    else:
        beside = _beside_task_vectors(job, piece, experts)
        if isinstance(job, Merge):
            # The experts' own values are let go of one by one. Small buffers serve again at once: all are there.
            let_go = waiting - waiting // len(job.of_its_shape)
            beside += let_go if piece.load == "medium" else 0
            space = (experts + 1) * piece.count * job.compute_dtype.itemsize
            buffers += min(space, beside) - (let_go if piece.load == "large" else 0)
    return Cost(waiting + shared, waiting + shared + beside + written, written, buffers)


def _known_entries(piece: Piece[Job], experts: int) -> int:
    """What is kept of one rule for the next: the eigenvectors of each task vector and of their sum, and that sum."""
    job = piece.job
    if isinstance(job, Keep) or not job.method.needs.matrix:
        return 0
    slices, rows, columns = job.matrices
    return (experts + 1) * slices * min(rows, columns) ** 2 + piece.count


def _beside_task_vectors(job: ByRule, piece: Piece[Job], experts: int) -> int:
    """Bytes at the peak, beside all inputs, where task vectors are formed."""
    waiting, count, width = piece.bytes_in, piece.count, job.compute_dtype.itemsize
    base = waiting // len(job.of_its_shape)
    deltas = (experts + 1) * count * width  # and W_0 in the same type
    differencing = max(waiting + 2 * count * width, base + deltas)
    if isinstance(job, MergeByToken) and job.vocabulary.lending is not None:  # all are read before the first is made
        differencing = waiting + deltas + 2 * count * width
    if isinstance(job, Merge) and any(job.updates):  # factors are read and widened beside them, DoRA works on a copy
        factors = sum(f.count * width // update.sharers for update in job.updates if update for f in update.factors)
        magnitude = any(update and update.magnitude for update in job.updates)
        differencing = waiting + deltas + factors + magnitude * count * width
    if job.method.needs.keep is not None:
        differencing = max(differencing, base + deltas + min(_COUNTED, 4 * width * count))
    widened = job.widens * 2 * count * 4  # the base, and one expert at a time
    work = _work_entries(job, piece, experts) * width
    return max(differencing, base + deltas + work) + widened - waiting


def _frees_tensors(needs: Needs) -> bool:
    """Whether a rule works in whole tensors of the layer's size, and in more than its result."""
    work = needs.work
    return not isinstance(work, Blocks) or (work.tensors > 1 and not (work.block or work.block_each))


def _work_entries(job: ByRule, piece: Piece[Job], experts: int) -> int:
    """What a rule works in beside full task vectors."""
    count = piece.count
    slices, rows, columns = job.matrices
    if piece.rows is not None or not job.method.needs.matrix:  # then the rule gets all of it at once
        slices, rows = 1, piece.shape[0] if piece.shape else 1
        columns = count // max(1, rows)
    threads = None if piece.load == "large" else 1  # others are computed side by side
    work = job.method.needs.work.entries(experts, rows, columns, threads) + (count if slices > 1 or job.groups else 0)
    work += experts * _measured(job, rows, columns, count)
    if job.makes_masks:  # eight entries to a byte
        work += experts * count // 8 // job.compute_dtype.itemsize
    if isinstance(job, Merge) and job.fused:
        work += (experts + 1) * count  # the projections' own task vectors, and what is made of them
    if isinstance(job, Merge) and job.factors:  # the merged update beside what its singular vectors take
        work = max(work, count + DECOMPOSITION.entries(experts, rows, columns))
    return work


def _measured(job: ByRule, rows: int, columns: int, count: int) -> int:
    """Entries of what was measured of one expert."""
    if job.method.needs.calibration is None:
        return 0
    if job.method.needs.calibration == "gradients":
        return count
    both = rows**2 if job.method.needs.calibration == "both sides" else 0
    return count // max(1, rows * columns) * (columns**2 + both)


def bytes_written(piece: Piece[Job]) -> int:
    """What the output stores of a piece."""
    job = piece.job
    if isinstance(job, Merge) and job.factors is not None:
        return sum(spec.nbytes for spec in job.factors)
    return piece.count * job.spec.dtype.itemsize


def _cores(job: Merge) -> tuple[int, int]:
    """The largest size that the cores of a job's updates may have."""
    _, rows, columns = job.matrices
    one_sided = job.method.needs.factors == "left frame"
    return min(rows, job.rank + 1), columns if one_sided else min(columns, job.rank)


def _low_rank_entries(job: Merge, experts: int) -> int:
    """What a merge from factors holds: some copies of the stacked factors, cores, and what the rule works in there."""
    _, rows, columns = job.matrices
    (p, q), work = _cores(job), job.method.needs.work
    one_sided = job.method.needs.factors == "left frame"  # its squares are of the side that is turned, p
    turns = ((q, p),) if one_sided else ((p, q), (q, p))
    on_cores = experts * p * q + max(work.entries(experts, *sides) for sides in turns)
    return 6 * (rows + columns) * (job.rank + 1) + on_cores


def _low_rank_operations(job: Merge, experts: int) -> int:
    """Bases of both sides by a QR and a product back, the rule on the cores, and the merged update itself."""
    _, rows, columns = job.matrices
    bases = 6 * (rows + columns) * job.rank**2
    return bases + job.method.operations(experts, *_cores(job)) + 2 * rows * columns * (job.rank + 1)


def operations(plan: Plan) -> int:
    """Floating-point operations of all rules, and of text that experts write to be calibrated on."""
    return sum(piece_operations(Piece(job), len(plan.experts)) for job in plan.jobs) + text_operations(plan)


def text_operations(plan: Plan) -> int:
    """Of writing and measuring the experts' own text, where it is as long as it may be; 0 without such."""
    wanted = {job.method.needs.calibration for job in plan.ruled} - {None}
    if plan.recipe.calibration != SELF or not wanted:
        return 0
    passes = 2 + 2 * bool(wanted & {"gradients", "both sides"})  # written, run again, and back
    weights = sum(job.spec.count for job in plan.jobs if len(job.spec.shape) > 1)
    measured = sum(
        _measured(job, *job.matrices[1:], job.spec.count) for job in plan.ruled if job.method.needs.calibration
    )
    return len(plan.experts) * TEXTS * TOKENS * (2 * passes * weights + 2 * measured)


def piece_operations(piece: Piece[Job], experts: int) -> int:
    """Floating-point operations of a rule on a piece."""
    job = piece.job
    if isinstance(job, Keep):
        return 0
    if isinstance(job, Merge) and job.joined:
        return piece_operations(Piece(job.as_one), experts)
    if isinstance(job, Merge) and job.keeps_low_rank:
        return _low_rank_operations(job, experts)
    slices, rows, columns = job.matrices
    whole = slices * job.method.operations(experts, rows, columns)
    return whole * piece.count // max(1, job.spec.count)


def largest(plan: Plan) -> tuple[int, str]:
    """The bytes of the piece that takes most, and its tensor's name."""
    experts = len(plan.experts)
    found = [(cost(next(pieces(job, job.entrywise)), experts).working, job.name) for job in plan.jobs]
    return max(found, default=(0, ""))


def resident(plan: Plan) -> int:
    """The bytes of the process itself, of what it notes of each tensor, and of what it keeps, whatever is in flight."""
    notes = _OF_TENSOR * len(plan.jobs) + _OF_INPUT * sum(len(job.inputs) for job in plan.jobs)
    return _PROCESS + notes + _kept(plan)


def _kept(plan: Plan) -> int:
    """What the C library keeps of what is freed. Tensors of one shape and rule work in as much."""
    freeing = [job for job in plan.ruled if _frees_tensors(job.method.needs)]
    unlike: dict[object, ByRule] = {(id(job.method), job.spec.shape, job.compute_dtype): job for job in freeing}
    each = ((job, next(pieces(job, job.entrywise))) for job in unlike.values())
    works = (_work_entries(job, piece, len(plan.experts)) * job.compute_dtype.itemsize for job, piece in each)
    return min(_KEPT, _KEPT_OF_EACH * len(freeing), max(works, default=0))


def peak_memory(plan: Plan) -> int:
    """Bytes that the process takes at most where nothing is read ahead of the largest tensor."""
    return resident(plan) + largest(plan)[0]


def _averaged(plan: Plan) -> int:
    """The same where every tensor is averaged, by ranges of rows."""
    by_rows = plan.recipe.nonfinite == "error"
    averaged = [
        replace(job, method=Average(), entrywise=by_rows, fused=None) if isinstance(job, Merge) else job
        for job in plan.jobs
    ]
    return peak_memory(replace(plan, jobs=tuple(averaged)))


def budget(plan: Plan, limit: int | None) -> int:
    """The bytes that may be in flight: what `limit` leaves, else `(T + 4) * largest tensor` and 200 MB.

    Raises UsageError when `limit` is too small for a tensor of the plan.
    """
    (needed, name), always = largest(plan), resident(plan)
    if limit is not None:
        if always + needed > limit:
            rule = next(job.rule for job in plan.jobs if job.name == name)
            what = f"tensor {name!r} by {rule} needs {always + needed:,} bytes, more than {limit:,}"
            cure = "allow more"
            if _averaged(plan) <= limit:
                cure += ", or give tensors of its size a rule that needs less, as average, in the recipe's rules"
            raise UsageError("--max-memory", what, cure)
        return limit - always
    tensors = [job.spec.count * job.compute_dtype.itemsize for job in plan.jobs]
    promised = (len(plan.experts) + 4) * max(tensors, default=0) + _ALLOWANCE - always
    return max(needed, promised)


def in_flight(costs: Sequence[Cost], workers: int) -> int:
    """The bytes of a queue in this order, `workers` of them being computed, those before finished, the rest read."""
    moments = (
        sum(c.written for c in costs[:i])
        + sum(c.working for c in costs[i : i + workers])
        + sum(c.waiting for c in costs[i + workers :])
        for i in range(len(costs))
    )
    return max(moments, default=0)


def outside_buffers(costs: Sequence[Cost], workers: int) -> int:
    """Of the bytes in flight of such a queue, the most that may lie elsewhere than in buffers that serve again."""
    beside = [max(0, c.working - c.written - c.buffers) for c in costs]
    working = max((sum(beside[i : i + workers]) for i in range(len(costs))), default=0)
    return sum(c.written for c in costs) + working


def together(parts: Sequence[Piece[Job]], costs: Sequence[Cost]) -> Cost:
    """Pieces that are read and written as one but computed one after the other, small ones as a stack."""
    waiting, written = sum(c.waiting for c in costs), sum(c.written for c in costs)
    beside = (
        (c.working - c.waiting - c.written) * min(piece.stack, len(parts))
        for piece, c in zip(parts, costs, strict=True)
    )
    buffers = costs[0].buffers if len(costs) == 1 else waiting  # those of a stack have none to work in
    return Cost(waiting, waiting + written + max(beside), written, buffers)
