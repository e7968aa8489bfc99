"""Byte ranges of an object as few, bounded requests, several of them in flight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

LARGEST = 8 << 20  # bytes of one request: large enough to pay for itself, small enough to go side by side
_GAP = 256 << 10  # bytes that are read for nothing rather than asking twice
_IN_FLIGHT = 8


@dataclass(frozen=True)
class Request:
    """The bytes from `start` to `end`, and where parts of them go: from which of them, into what."""

    start: int
    end: int
    targets: tuple[tuple[int, memoryview], ...]


# Buffers that are to be filled one behind the other from an offset.
Run = tuple[int, Sequence[memoryview]]


def requests(runs: Iterable[Run]) -> Iterator[Request]:
    """The requests that fill all runs: those that are near each other together, none larger than `LARGEST`."""
    gathered: list[tuple[int, memoryview]] = []
    for start, view in _pieces(runs):
        end = start + len(view)
        if gathered:
            first, last = gathered[0][0], max(at + len(piece) for at, piece in gathered)
            if start < first or start > last + _GAP or end > first + LARGEST:
                yield _request(gathered)
                gathered = []
        gathered.append((start, view))
    if gathered:
        yield _request(gathered)


def _pieces(runs: Iterable[Run]) -> Iterator[tuple[int, memoryview]]:
    for offset, buffers in runs:
        at = offset
        for buffer in buffers:
            view = buffer.cast("B") if buffer.format != "B" else buffer
            for i in range(0, len(view), LARGEST):
                yield at + i, view[i : i + LARGEST]
            at += len(view)


def _request(gathered: Sequence[tuple[int, memoryview]]) -> Request:
    end = max(at + len(view) for at, view in gathered)
    return Request(gathered[0][0], end, tuple(gathered))


def fill(runs: Iterable[Run], read: Callable[[int, int], bytes]) -> None:
    """Fill all runs by `read`, which gives the bytes from one offset to another, in several threads at once."""

    def serve(request: Request) -> None:
        content = memoryview(read(request.start, request.end))
        for at, view in request.targets:
            view[:] = content[at - request.start : at - request.start + len(view)]

    wanted = list(requests(runs))
    if len(wanted) == 1:
        serve(wanted[0])
        return
    for done in [_threads().submit(serve, request) for request in wanted]:
        done.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_IN_FLIGHT, "acemerge-ranges")
