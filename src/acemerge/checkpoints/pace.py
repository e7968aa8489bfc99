"""How fast files are read and written here and now: of the very files that are read, at the place of the output."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.errors import AcemergeError

_CHUNK = 4 << 20
_PLACES, _IN_A_ROW = 2, 3  # chunks of each file: a disk is faster with what follows
_WRITTEN = 8
_AT_ONCE = 4
_MOST = 0.15  # seconds, but for the chunk that is under way


@dataclass(frozen=True)
class FilePace:
    """Seconds for a byte that is read, read once more, and written and synced; 0 of what is not known. Of reading it
    processors work for `copying`: all of it, where the system's cache has the files.
    """

    reading: float = 0.0
    rereading: float = 0.0
    writing: float = 0.0
    copying: float = 0.0


def seconds_to_read(paths: Sequence[Path]) -> tuple[float, float]:
    """For a byte of these files where all are read at once, from the disk or from the system's cache as far as that has
    them; and of one processor's work for it. Of objects in stores it is not known: 0.
    """
    here = [path for path in paths if not scheme_of(path)][: 2 * _AT_ONCE]
    spaces = [memoryview(bytearray(_CHUNK)) for _ in here]  # not to be mapped while the clock runs
    started = time.perf_counter()
    with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(here)))) as pool:
        found = list(pool.map(lambda path, space: _read_some(path, space, started + _MOST), here, spaces))
    nbytes = sum(done for done, _ in found) or math.inf
    return (time.perf_counter() - started) / nbytes, sum(worked for _, worked in found) / nbytes


def _read_some(path: Path, space: memoryview, until: float) -> tuple[int, float]:
    """Bytes that were read of a file, at places that are spread over it, and the thread's seconds of a processor; none
    of one that cannot be read.
    """
    done, started = 0, time.thread_time()
    with contextlib.suppress(AcemergeError):
        size = files.fingerprint(path)[0]
        descriptor = files.open_for_reading(path)
        try:
            chunk = min(_CHUNK, size // (_PLACES * _IN_A_ROW))
            for i in range(_PLACES * _IN_A_ROW):
                place, row = divmod(i, _IN_A_ROW)
                files.read_into(descriptor, [space[:chunk]], place * (size // _PLACES) + row * chunk, path)
                done += chunk
                if time.perf_counter() > until:
                    break
        finally:
            files.close(descriptor)
    return done, time.thread_time() - started


def seconds_to_write(path: Path) -> float:
    """For a byte of a file at this path, or in the nearest folder around it that is there, and on its disk.

    It is written to a file without a name, which is gone with its descriptor, whatever happens. 0 where the system has
    no such files, or does not let them be made there; and for a store.
    """
    unnamed = getattr(os, "O_TMPFILE", 0)
    if scheme_of(path) or not unnamed:
        return 0.0
    with contextlib.suppress(OSError, ValueError):
        folder = next(place for place in (path, *path.parents) if place.is_dir())
        descriptor = os.open(folder, os.O_WRONLY | unnamed | files.OWN, 0o600)
        try:
            block = os.urandom(_CHUNK)
            # Once for the memory alone: a virtual machine is slow to get what it never had.
            _write_some(descriptor, block)
            os.ftruncate(descriptor, 0)
            started = time.perf_counter()
            done = _write_some(descriptor, block)
            os.fsync(descriptor)
            return (time.perf_counter() - started) / done
        finally:
            files.close(descriptor)
    return 0.0


def _write_some(descriptor: int, block: bytes) -> int:
    """Bytes that were written behind each other from the file's beginning."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return sum(os.write(descriptor, block) for _ in _until(time.perf_counter() + _MOST))


def _until(end: float) -> Iterator[int]:
    """So many blocks as are written, at least one."""
    for i in range(_WRITTEN):
        yield i
        if time.perf_counter() > end:
            return
