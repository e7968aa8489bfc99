"""The command `acemerge`: what must be settled before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
from typing import NoReturn

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def main() -> None:
    # Threads that wait by spinning take the processors from each other: with anything else at work on the machine,
    # small layers become several times slower. Spinning for a moment only costs nothing on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    _keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)  # an import may swallow an exception
    gc.set_threshold(100_000)  # libraries make many objects, and nearly all of them stay
    try:
        from acemerge.cli.app import main as run
        from acemerge.cli.app import terminated
    except Exception as failure:
        _explain(failure)
        raise

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):  # a name may hold half a character, which no terminal can be sent
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    run()


def _keep_freed_memory() -> None:
    """Have glibc use freed blocks of a few MB again. Giving them back and mapping new ones costs more than the work
    that is done in them. All threads share one arena: in one of its own each would keep what it freed from the others,
    and on a busy machine, where threads take turns, that came to several times the bound on memory.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system's C library has no such knobs
        mallopt = ctypes.CDLL(None).mallopt
        for knob, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20), (_M_ARENA_MAX, 1)):
            mallopt(knob, value)


def _explain(failure: Exception) -> None:
    """End with one line where the libraries could not be loaded for lack of memory, by whatever they say of it."""
    import resource

    from acemerge.errors import shortage_of

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = limit != resource.RLIM_INFINITY and not isinstance(failure, ModuleNotFoundError)
    if limited or shortage_of(failure):
        within = f" within {limit:,} bytes of address space (ulimit -v)" if limited else ""
        os.write(2, f"acemerge: error: memory: there is not enough to start{within}; allow more\n".encode())
        os._exit(4)


def _quit(number: int, _: object) -> NoReturn:
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    os.write(2, f"acemerge: error: {what}: nothing was done; run the same command again\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
