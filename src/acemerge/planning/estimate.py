"""How long a plan will take, about: from its operations and from what this machine does in a moment."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from acemerge.checkpoints.hashes import IN_CACHE
from acemerge.checkpoints.pace import FilePace
from acemerge.linalg.threads import pool_of
from acemerge.methods.base import Workspace
from acemerge.planning.costs import piece_operations, text_operations
from acemerge.planning.jobs import ByRule, Job, Keep, Merge, Plan
from acemerge.planning.pieces import Piece

# An operation of a rule takes so many times as long as one that is measured: in factors, and of whole matrices by their
# shorter side, with calls and checks that cost the most in small ones; and where all of it is singular vectors. See
# `benchmarks/expected.py`.
_FACTORING, _CALLS, _SHORTEST, _SPECTRAL = 2.5, 150, 64, 1.8
# So many steps over an entry does an operation of a rule take that sees no matrix: others than sums make masks, signs
# and counts in memory of their own. And so many takes a count of a magnitude.
_SUMMING, _CHOOSING, _COUNTING = 0.75, 6.0, 20.0
# Seconds of a run before its first tensor and behind its last one, and of Python's own work for each.
_AROUND, _TENSOR = 0.6, 0.5e-3
# What is measured for a rule on matrices: some products, and one eigen-decomposition of about `9 n^3` operations, which
# are three in ten of all. How much slower it is differs from one processor to the next.
_SIDE, _PRODUCTS, _DECOMPOSED = 512, 4, 384
_ENTRIES = 1 << 20
_LONG_ENOUGH = 0.08  # seconds of each measurement


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second with all of its threads: floating-point operations of a rule on matrices, entries
    that are read in bfloat16, widened and subtracted, bytes that are hashed.
    """

    operations: float
    entries: float
    hashing: float


# To weigh tensors against each other; as seconds they mean nothing.
COMMON = Rates(100e9, 0.5e9, 2e9)


def measure_rates(device: torch.device) -> Rates:
    """Measured on this machine as it is now, in less than half a second.

    On the CPU by all threads at once, each by itself: they share what memory gives, and processors that may be halves
    of one or have other work. Threads that wait for each other would tell of the longest turn that another took.
    Another device does what one thread asks of it.
    """
    threads, is_host = torch.get_num_threads(), device.type == "cpu"
    X, S, data = torch.randn(_SIDE, _SIDE, device=device), torch.randn(_DECOMPOSED, _DECOMPOSED), os.urandom(IN_CACHE)

    def finish() -> None:
        if not is_host:
            torch.accelerator.synchronize(device)

    def rule() -> int:
        for _ in range(_PRODUCTS):
            X @ X
        finish()
        if is_host:  # elsewhere few are made, and not all devices have them
            torch.linalg.eigh(S)
        return _PRODUCTS * 2 * _SIDE**3 + (9 * _DECOMPOSED**3 if is_host else 0)

    def widening() -> Callable[[], int]:
        # Each thread has a task vector after the other before it, more than its cache holds. Zeros would be one page
        # of memory, over and over.
        stored, wide = torch.ones(4, _ENTRIES, dtype=torch.bfloat16), torch.ones(5, _ENTRIES, device=device)

        def work() -> int:
            for i in range(4):
                wide[i].copy_(stored[i]).sub_(wide[4])
            finish()
            return stored.numel()

        return work

    def hashed() -> int:
        hashlib.sha256(data).digest()
        return IN_CACHE

    asking = threads if is_host else 1
    return Rates(_rate(lambda: rule, asking), _rate(widening, asking), _rate(lambda: hashed, threads))


def _rate_of(work: Callable[[], int]) -> float:
    """What is done in a second, after a first call: what others take of the machine counts, as it will in the run."""
    work()
    started, done = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < _LONG_ENOUGH:
        done += work()
    return done / took


def _rate(begin: Callable[[], Callable[[], int]], threads: int) -> float:
    """The same by so many threads at once, each with what it begins with."""
    with pool_of(threads, "rates") as pool:
        return sum(pool.map(lambda _: _rate_of(begin()), range(threads)))


def piece_seconds(piece: Piece[Job], experts: int, rates: Rates) -> float:
    """Of computing a piece and hashing its inputs, with all threads at work.

    A rule's own operations are products and factorings where it sees matrices, else steps over all entries; each
    expert's entries are read, widened and subtracted before that, and the sum is rounded after it.
    """
    job = piece.job
    hashing = piece.bytes_in / rates.hashing
    if isinstance(job, Keep):
        return hashing
    low_rank = isinstance(job, Merge) and job.keeps_low_rank
    operations = piece_operations(piece, experts)
    by_products = job.method.needs.matrix or low_rank
    per_second = rates.operations / _times_products(job) if by_products else rates.entries / _steps(job)
    passes = 1 + (0 if low_rank else experts)
    return hashing + operations / per_second + passes * piece.count / rates.entries


def _times_products(job: ByRule) -> float:
    if isinstance(job, Merge) and job.keeps_low_rank:
        return _FACTORING
    times = 1 + _CALLS / max(_SHORTEST, min(job.matrices[1:]))
    work = job.method.needs.work
    # Squares of the shorter side are those of singular vectors; other rules solve systems of another one.
    return times * (_SPECTRAL if isinstance(work, Workspace) and work.side == "shorter" else 1)


def _steps(job: ByRule) -> float:
    return _SUMMING if job.method.needs.factors == "linear" else _CHOOSING


def plan_seconds(plan: Plan, rates: Rates, pace: FilePace | None = None) -> float:
    """Of all tensors, about.

    What reads and what computes runs side by side, so that the time lies between the longer of both and their sum: a
    third of the way is off by half at most. What is written is on the disk in the end, much of it after all else.
    """
    pace, experts = pace or FilePace(), len(plan.experts)
    working = sum(piece_seconds(Piece(job), experts, rates) for job in plan.jobs) + _TENSOR * len(plan.jobs)
    looking = sum(job.spec.count for job in plan.ruled if job.method.needs.keep is not None)
    working += 2 * experts * looking * _COUNTING / rates.entries
    working += text_operations(plan) / rates.operations + plan.bytes_written / rates.hashing
    copying = (plan.bytes_read + plan.bytes_reread) * pace.copying
    reading = max(0.0, plan.bytes_read * pace.reading + plan.bytes_reread * pace.rereading - copying)
    working += copying
    return _AROUND + max(working, reading) + min(working, reading) / 3 + plan.bytes_written * pace.writing
