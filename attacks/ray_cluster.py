"""A Ray cluster whose nodes are all on this machine, and the processes of its tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """So many nodes of one processor each, the first its head."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own, 15, leaves a busy machine to all others
    cluster = _begun(nodes)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _begun(nodes: int, tries: int = 4) -> Any:
    """A node has half a minute to begin, which is little on a busy machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(nodes):
            cluster.add_node(**NODE)
        return cluster
    except Exception:  # Ray has no type for it
        cluster.shutdown()
        if tries == 1:
            raise
    return _begun(nodes, tries - 1)


def tasks_at_work() -> list[psutil.Process]:
    """The processes of this one's cluster that compute a part now; there may be others on this machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith("ray::compute"):
                found.append(process)
    return found
