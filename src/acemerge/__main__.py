"""The command `acemerge`: what must be settled before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from typing import NoReturn

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def main() -> None:
    # Threads that wait by spinning take the processors from each other: with anything else at work on the machine,
    # small layers become several times slower. Spinning for a moment only costs nothing on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    _keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)  # an import may swallow an exception
    gc.set_threshold(100_000)  # libraries make many objects, and nearly all of them stay
    from acemerge.cli.app import main as run
    from acemerge.cli.app import terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    run()


def _keep_freed_memory() -> None:
    """Have glibc use freed blocks of a few MB again. Giving them back and mapping new ones costs more than the work
    that is done in them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system's C library has no such knobs
        mallopt = ctypes.CDLL(None).mallopt
        for knob, nbytes in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
            mallopt(knob, nbytes)


def _quit(number: int, _: object) -> NoReturn:
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    os.write(2, f"acemerge: error: {what}: nothing was done; run the same command again\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
