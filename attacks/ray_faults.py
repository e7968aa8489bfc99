"""Row 45: on a Ray cluster of two nodes a worker is killed, a node removed, a task left without memory, the driver
killed: the merge goes on, or one line says that it does not and --resume does, with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from acemerge.errors import ResourceError
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, in_process
from attacks.ray_cluster import NODE, cluster_of, tasks_at_work

ROW, FULL = 45, 80  # 20 of each
_LONGEST = 2.0  # seconds after the first part has begun: so long the merge takes, about


def attack(folder: Path, count: int, seed: int) -> Tally:
    import ray

    tally, rng = Tally(), random.Random(seed)
    case = Case(folder, "ace", layers=48, side=192, shards=4)
    kinds = (_worker_killed, _node_removed, _without_memory, _driver_killed)
    with cluster_of(2) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        for trial in range(count):
            kind, delay = kinds[trial % len(kinds)], rng.random() * _LONGEST
            label = f"{kind.__name__[1:].replace('_', ' ')} after {delay:.2f} s"
            shutil.rmtree(folder / "out", ignore_errors=True)
            clean(tally, label, partial(kind, case, cluster, delay), must="accept")
        ray.shutdown()
    return tally


def _worker_killed(case: Case, cluster: Any, delay: float) -> None:
    def kill() -> None:
        for process in tasks_at_work()[:1]:
            process.kill()

    with _when_begun(case, delay, kill):
        case.merge(case.folder / "out", ray=cluster.address)
    case.check_output(case.folder / "out")


def _node_removed(case: Case, cluster: Any, delay: float) -> None:
    (node,) = cluster.worker_nodes
    try:
        with _when_begun(case, delay, lambda: cluster.remove_node(node, allow_graceful=False)):
            case.merge(case.folder / "out", ray=cluster.address)
        case.check_output(case.folder / "out")
    finally:
        if not cluster.worker_nodes:
            cluster.add_node(**NODE)


def _without_memory(case: Case, cluster: Any, delay: float) -> None:
    """A task may map a megabyte more than it has: it says so itself, or its process ends.

    Ray gives a process that lives on to further tasks, and the limit is this case's alone.
    """
    limited: list[psutil.Process] = []

    def limit() -> None:
        for process in tasks_at_work()[:1]:
            limited.append(process)
            most = process.memory_info().vms + (1 << 20)
            process.rlimit(psutil.RLIMIT_AS, (most, most))

    out = case.folder / "out"
    with _when_begun(case, delay, limit):
        try:
            case.merge(out, ray=cluster.address)
        except ResourceError as failure:
            check("--resume" in str(failure) and not (out / "acemerge.json").exists(), str(failure))
            case.merge(out, resume=True)
        finally:
            for process in limited:
                with contextlib.suppress(psutil.Error):
                    process.kill()
    case.check_output(out)


def _driver_killed(case: Case, cluster: Any, delay: float) -> None:
    """And gone on with by one process, or on the cluster by another driver."""
    out = case.folder / "out"
    process = in_process(_drive, case, cluster.address, out)
    with _when_begun(case, delay, process.kill):
        process.join(90)
    while tasks_at_work():  # Ray ends them when it learns of it
        time.sleep(0.05)
    # Where it was killed after it had published, this verifies that and tidies up.
    case.merge(out, resume=True, **({"ray": cluster.address} if delay < _LONGEST / 2 else {}))
    case.check_output(out)


def _drive(case: Case, address: str, out: Path) -> None:
    case.merge(out, ray=address)


@contextlib.contextmanager
def _when_begun(case: Case, delay: float, act: Callable[[], object]) -> Iterator[None]:
    """As the block runs, act once: so long after the first part has begun."""
    over = threading.Event()

    def wait() -> None:
        while not any(".acemerge.journal" in names for _, _, names in os.walk(case.folder / "out")):
            if over.wait(0.01):
                return
        if not over.wait(delay):
            with contextlib.suppress(psutil.Error):  # it was too late
                act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main(("ray_faults",))
