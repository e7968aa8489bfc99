"""How long a plan will take, about: from its operations and from what this machine does in a moment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from acemerge.planning.costs import piece_operations, text_operations
from acemerge.planning.jobs import Job, Keep, Merge, Plan
from acemerge.planning.pieces import Piece

# So many times as long as products of the same number of operations take what a rule does beside products,
# factorings and solves, in small matrices: see `benchmarks/expected.py`.
_FACTORING = 2.5
_SIDE = 512  # of the product that is measured
_ENTRIES = 1 << 21
_HASHED = 4 << 20
_LONG_ENOUGH = 0.1  # seconds of each measurement


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: floating-point operations in products, entries that are read in bfloat16,
    widened and subtracted, bytes that one thread hashes; and how many hash at once.
    """

    products: float
    entries: float
    hashing: float
    threads: int


# To weigh tensors against each other; as seconds they mean nothing.
COMMON = Rates(100e9, 0.5e9, 1e9, 2)


def measure_rates(device: torch.device) -> Rates:
    """Measured on this machine as it is now, in less than half a second."""
    X = torch.randn(_SIDE, _SIDE, device=device)
    stored, wide = torch.zeros(_ENTRIES, dtype=torch.bfloat16), torch.zeros(_ENTRIES, device=device)
    data = bytes(_HASHED)

    def on_device(work: Callable[[], object]) -> Callable[[], object]:
        def done() -> None:
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        return done

    return Rates(
        2 * _SIDE**3 / _seconds_of(on_device(lambda: X @ X)),
        _ENTRIES / _seconds_of(on_device(lambda: wide.copy_(stored).sub_(wide))),
        _HASHED / _seconds_of(lambda: hashlib.sha256(data).digest()),
        torch.get_num_threads(),
    )


def _seconds_of(work: Callable[[], object]) -> float:
    """Of one call, the median of several after a first: what else the machine does comes in bursts."""
    work()
    calls: list[float] = []
    while sum(calls) < _LONG_ENOUGH:
        started = time.perf_counter()
        work()
        calls.append(time.perf_counter() - started)
    return median(calls)


def piece_seconds(piece: Piece[Job], experts: int, rates: Rates) -> float:
    """Of computing a piece and hashing its inputs, with all threads at work.

    A rule's own operations are products and factorings where it sees matrices, else steps over all entries; each
    expert's entries are read, widened and subtracted before that, and the sum is rounded after it.
    """
    job = piece.job
    hashing = piece.bytes_in / (rates.hashing * rates.threads)
    if isinstance(job, Keep):
        return hashing
    low_rank = isinstance(job, Merge) and job.keeps_low_rank
    operations = piece_operations(piece, experts)
    per_second = rates.products / _FACTORING if job.method.needs.matrix or low_rank else rates.entries
    passes = 1 + (0 if low_rank else experts)
    return hashing + operations / per_second + passes * piece.count / rates.entries


def plan_seconds(plan: Plan, rates: Rates) -> float:
    """Of all tensors, about; disks that are slower than this add to it."""
    experts = len(plan.experts)
    computing = sum(piece_seconds(Piece(job), experts, rates) for job in plan.jobs)
    looking = sum(job.spec.count for job in plan.ruled if job.method.needs.keep is not None)
    computing += text_operations(plan) / rates.products
    return computing + 2 * experts * looking / rates.entries + plan.bytes_written / (rates.hashing * rates.threads)
