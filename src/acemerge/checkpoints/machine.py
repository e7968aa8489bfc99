"""What the system says of this machine and of the process's limits, as far as it says anything."""

from __future__ import annotations

import contextlib
import os
import resource

from acemerge.checkpoints.files import close


def stays_cached(nbytes: int) -> bool:
    """Whether so much may stay in the system's cache, for whoever reads it next: up to a quarter of the memory."""
    try:
        return nbytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (OSError, ValueError, AttributeError):
        return True


def address_space_left() -> int | None:
    """The bytes that a limit on the process's address space (ulimit -v) leaves; None where there is no such limit."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError):
        pages = int(_first_bytes("/proc/self/statm").split()[0])
        return max(0, most - pages * resource.getpagesize())
    return most


def stack_size() -> int:
    """The bytes of address space that a thread takes."""
    size = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return 8 << 20 if size == resource.RLIM_INFINITY else size


def processor() -> str:
    """Maker, family and model of the processor, as far as the system says; an empty text where it does not."""
    keys = (b"vendor_id", b"cpu family", b"model", b"CPU implementer", b"CPU part")
    with contextlib.suppress(OSError):
        lines = [line.partition(b":") for line in _first_bytes("/proc/cpuinfo").split(b"\n\n")[0].splitlines()]
        return " ".join(value.strip().decode(errors="replace") for key, _, value in lines if key.strip() in keys)
    return ""


def _first_bytes(path: str) -> bytes:
    """Of what the kernel says of this machine, as much as fits in one read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 13)
    finally:
        close(descriptor)
