"""How much memory a rule takes for one layer, measured in a process that has done nothing else."""

from __future__ import annotations

import ctypes
import itertools
from multiprocessing.connection import Connection

import torch
from torch.profiler import ProfilerActivity, profile

import acemerge
from attacks.merging import CONTEXT  # one server for all, which has imported torch already


def added_by(name: str, experts: int, sides: tuple[int, int]) -> int:
    """Bytes on top of the task vectors at the high-water mark of a merge by the rule's defaults."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(name, experts, sides, theirs))
    process.start()
    theirs.close()
    try:
        found: int = ours.recv()
    finally:
        process.join()
    return found


def _measure(name: str, experts: int, sides: tuple[int, int], answer: Connection) -> None:
    torch.set_num_threads(2)
    acemerge.merge_deltas(torch.randn(experts, 256, 256), name)  # what libraries keep for every thread is there then
    deltas = 0.02 * torch.randn(experts, *sides, generator=torch.Generator().manual_seed(0))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    before = _kilobytes("VmRSS")
    acemerge.merge_deltas(deltas, name)
    answer.send((_kilobytes("VmHWM") - before) * 1024)


def allocated_by(name: str, deltas: torch.Tensor, **params: float | str | bool) -> int:
    """Bytes that torch's allocator had given out at once, beside the task vectors: what a rule's own tensors take, to
    the byte, and workspaces of LAPACK's.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        acemerge.merge_deltas(deltas, name, **params)
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in steps))


def _kilobytes(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
