"""Work side by side, each piece by one thread: eigen-decompositions gain little from more than one each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def pool_of(count: int, name: str, of_torch: int = 1, begin: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """Threads that are there already, each with `of_torch` threads for torch's own work, after `begin`."""
    all_there = Barrier(count + 1)

    def started() -> None:
        torch.get_num_threads()  # a thread's first call takes what all had last: not to happen later
        torch.set_num_threads(of_torch)
        if begin is not None:
            begin()

    pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=started)
    for _ in range(count):
        pool.submit(all_there.wait)
    all_there.wait()
    torch.set_num_threads(torch.get_num_threads())  # what one thread says is also what later ones begin with
    return pool


def side_by_side(function: Callable[[Item], Made], items: Sequence[Item], device: torch.device) -> list[Made]:
    """`[function(item) for item in items]`, on a CPU as many at once as torch has threads, each on one of them.

    A result does not depend on how many run at once.
    """
    threads = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1
    if threads < 2:
        return [function(item) for item in items]
    with pool_of(threads, "side by side") as pool:
        return list(pool.map(function, items))
