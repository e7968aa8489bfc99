"""The child's half of a measurement: it holds one job and runs it when its parent says so.

Requests come as lines on stdin and are answered with one line of JSON each:

    first        a run that tells its time and the peak of added memory; the warm-up
    again        a run that tells its time and, if it is long, the share of the processors that others took
    rate         GFLOP/s of a float32 product on the same threads, and of what else the job's floor is made of
    save PATH    write the last result there as .npy

The first line that a child writes says that its inputs are built. Only torch and numpy are needed here, for the
same file serves acemerge's environment and the peers'.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from shapes import Case
from torch import Tensor

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
LONG = 0.5  # seconds from which on a run is asked what else the processors did; they count in hundredths


@dataclass
class Job:
    """What is timed: `parts` one after the other, each on its own clock.

    `result` takes what the last part gave and makes the merged update of it; None where the parts are not the
    whole job. `status` reads what the rule says of itself. `about` is passed on to the parent; `rates` measures what
    the floor needs beside the rate of products.
    """

    parts: list[Callable[[], Any]]
    result: Callable[[Any], Tensor] | None = lambda merged: merged
    status: Callable[[Any], str] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    rates: Callable[[], dict[str, float]] = dict


def serve(prepare: Callable[[Case], Job], case: Case) -> None:
    """Answer the parent's requests until it closes the pipe."""
    answers = _take_stdout()
    try:
        _limit_memory()
        torch.set_num_threads(THREADS)
        job = prepare(case.small())
        for part in job.parts:
            part()
        job = prepare(case)
        _answer(answers, {"about": {"torch": torch.__version__, **job.about}, "can_save": job.result is not None})
        merged: Any = None
        for line in sys.stdin:
            request, _, path = line.strip().partition(" ")
            if request in ("first", "again"):
                merged = None
                merged, reply = _run(job, with_memory=request == "first")
                _answer(answers, reply)
            elif request == "rate":
                _answer(answers, {"gflops": product_rate(), **job.rates()})
            elif request == "save" and job.result is not None:
                np.save(path, job.result(merged).numpy())
                _answer(answers, {})
    except BaseException as failure:  # the parent puts it in the table
        traceback.print_exc()
        _answer(answers, {"error": (str(failure).splitlines() or [""])[0][:200] or type(failure).__name__})


def _run(job: Job, with_memory: bool) -> tuple[Any, dict[str, Any]]:
    if with_memory:
        before = reset_peak()
    seconds = []
    merged: Any = None
    busy, own = _cpu_seconds()
    for part in job.parts:
        merged = None
        started = time.perf_counter()
        merged = part()
        seconds.append(time.perf_counter() - started)
    after, own_after = _cpu_seconds()
    reply: dict[str, Any] = {"seconds": seconds, "status": job.status(merged) if job.status else ""}
    if sum(seconds) > LONG:
        others = after - busy - (own_after - own)
        reply["others"] = max(0.0, others / sum(seconds) / (os.cpu_count() or 1))
    if with_memory:
        reply["added_mb"] = (memory("VmHWM") - before) / 1e6
    return merged, reply


def _cpu_seconds() -> tuple[float, float]:
    """Processor time spent so far by everything on this machine, and by this process."""
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def product_rate(size: int = 2048) -> float:
    """GFLOP/s of `size`^3 in float32, the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def reset_peak() -> float:
    """Give freed memory back to the system, start the peak anew, return the bytes held now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> float:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _limit_memory() -> None:
    """Fail with an error where the machine would run out of memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = int(0.9 * free) if hard == resource.RLIM_INFINITY else min(int(0.9 * free), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _take_stdout() -> IO[str]:
    """The real stdout for answers; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: IO[str], reply: dict[str, Any]) -> None:
    answers.write(json.dumps(reply) + "\n")
    answers.flush()
