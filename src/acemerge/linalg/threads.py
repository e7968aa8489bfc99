"""Work side by side: eigen-decompositions gain less from a second thread than from one each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def pool_of(count: int, name: str, of_torch: int = 1, begin: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """Threads that are there already, each with `of_torch` threads for torch's own work, after `begin`."""
    all_there = Barrier(count + 1)

    def started() -> None:
        torch.get_num_threads()  # a thread's first call takes what all had last: not to happen later
        torch.set_num_threads(of_torch)
        if begin is not None:
            begin()

    pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=started)
    try:
        for _ in range(count):
            pool.submit(all_there.wait)
    except RuntimeError:  # one could not be started: let go of those that wait for it
        all_there.abort()
        pool.shutdown(wait=False)
        raise
    all_there.wait()
    torch.set_num_threads(torch.get_num_threads())  # what one thread says is also what later ones begin with
    return pool


def check_room(count: int) -> None:
    """RuntimeError where so many more threads cannot be started.

    OpenMP would end the process without a word to us.
    """
    gate, started = Event(), []
    try:
        for _ in range(count):
            thread = Thread(target=gate.wait)
            thread.start()
            started.append(thread)
    finally:
        gate.set()
        for thread in started:
            thread.join()


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """`map(function, items)`, on a CPU two at once, each with half of torch's threads; more would take more memory.

    A result that nobody has taken yet is one of the two: where the first is slow, others do not pile up behind it.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or len(items) < 2:
        yield from map(function, items)
        return
    with pool_of(2, "side by side", threads // 2) as pool:
        begun: deque[Future[Result]] = deque()
        for item in items:
            if len(begun) == 2:
                yield begun.popleft().result()
            begun.append(pool.submit(function, item))
        while begun:
            yield begun.popleft().result()
