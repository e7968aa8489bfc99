"""What the system says of this machine and of the process's limits, as far as it says anything; and what it is told of
the process's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from acemerge.checkpoints.files import close

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MOST_FREED = 40_000_000

_SYSTEM = Path("/")
# Control groups: where they are, the files of a group's limit on memory and of its use, and how its totals are named.
_UNIFIED = ("sys/fs/cgroup", "memory.max", "memory.current", b"")
_OF_MEMORY = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", b"total_")


def keep_freed_memory() -> None:
    """Have glibc use freed blocks of a few MB again. Giving them back and mapping new ones costs more than the work
    that is done in them. All threads share one arena: in one of its own each would keep what it freed from the others,
    and on a busy machine, where threads take turns, that came to several times the bound on memory.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's C library has no such knobs
        mallopt = ctypes.CDLL(None).mallopt
        for knob, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20), (_M_ARENA_MAX, 1)):
            mallopt(knob, value)


class _Blocks(ctypes.Structure):
    """What glibc's `mallinfo2` tells; `free` are the bytes of freed blocks that it keeps."""

    _fields_ = [(f"_{i}", ctypes.c_size_t) for i in range(8)] + [("free", ctypes.c_size_t), ("_9", ctypes.c_size_t)]


def give_back_freed_memory(more_than: int = _MOST_FREED) -> None:
    """Return freed blocks to the system where there are more than so many bytes of them.

    torch aligns its memory, and glibc then leaves slivers beside it. A small object in such a sliver keeps a freed
    block from being joined and used again: without this the heap grows for as long as a run lasts.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Blocks
        if library.mallinfo2().free > more_than:
            library.malloc_trim(0)


def stays_cached(nbytes: int) -> bool:
    """Whether so much may stay in the system's cache, for whoever reads it next: up to a quarter of the memory."""
    try:
        return nbytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (OSError, ValueError, AttributeError):
        return True


def free_memory(system: Path = _SYSTEM) -> int | None:
    """The bytes of memory that can be had before something else has to go, within the limits of the control groups
    that the process is in; None where the system does not say.
    """
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (system / "proc/meminfo").read_bytes().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith(b"MemAvailable:"))
        return max(0, min([free, *_left_by_groups(system)]))
    return None


def _left_by_groups(system: Path) -> Iterator[int]:
    """What the limit of each control group leaves that the process is in, and of each around it.

    Files' cache gives way and counts as free; what lies in a tmpfs is no part of it.
    """
    for line in (system / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, limit, use, total = _OF_MEMORY if controllers else _UNIFIED
        root, group = system / place, system / place / name.lstrip("/")
        for folder in (group, *group.parents)[: len(group.parts) - len(root.parts) + 1]:
            # A root has no limit, others say "max", and from within a container a group's name may lead nowhere.
            with contextlib.suppress(OSError, ValueError):
                stat = dict(line.split() for line in (folder / "memory.stat").read_bytes().splitlines())
                cache = sum(int(stat.get(total + kind, 0)) for kind in (b"active_file", b"inactive_file"))
                yield int((folder / limit).read_text()) - int((folder / use).read_text()) + cache


def folder_in_memory(system: Path = _SYSTEM) -> Path | None:
    """A folder whose files are in memory and on no disk, on systems that have one."""
    place = _SYSTEM / "dev/shm"
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in (system / "proc/self/mounts").read_text().splitlines()]
        if [str(place), "tmpfs"] in [mount[1:3] for mount in mounts] and os.access(place, os.W_OK):
            return place
    return None


def address_space_left() -> int | None:
    """The bytes that a limit on the process's address space (ulimit -v) leaves; None where there is no such limit."""
    most = limit("RLIMIT_AS")
    if most is None:
        return None
    with contextlib.suppress(OSError):
        pages = int(_first_bytes("/proc/self/statm").split()[0])
        return max(0, most - pages * mmap.PAGESIZE)
    return most


def limit(name: str) -> int | None:
    """A limit on this process by its name in `resource`; None where there is none, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    value = resource.getrlimit(getattr(resource, name))[0]
    return None if value == resource.RLIM_INFINITY else value


def stack_size() -> int:
    """The bytes of address space that a thread takes."""
    return limit("RLIMIT_STACK") or 8 << 20


def processor() -> str:
    """Maker, family and model of the processor, as far as the system says; an empty text where it does not."""
    keys = (b"vendor_id", b"cpu family", b"model", b"CPU implementer", b"CPU part")
    with contextlib.suppress(OSError):
        lines = [line.partition(b":") for line in _first_bytes("/proc/cpuinfo").split(b"\n\n")[0].splitlines()]
        return " ".join(value.strip().decode(errors="replace") for key, _, value in lines if key.strip() in keys)
    return ""


def _first_bytes(path: str) -> bytes:
    """Of what the kernel says of this machine, as much as fits in one read."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 13)
    finally:
        close(descriptor)
