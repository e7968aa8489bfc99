"""The command `acemerge`: what must be settled before torch is imported."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    # Threads that wait by spinning take the processors from each other: with anything else at work on the machine,
    # small layers become several times slower. Spinning for a moment only costs nothing on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)  # an import may swallow an exception
    gc.set_threshold(100_000)  # libraries make many objects, and nearly all of them stay
    try:
        from acemerge.checkpoints.machine import keep_freed_memory

        keep_freed_memory()
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


def _explain(failure: Exception) -> None:
    """End with one line where the libraries could not be loaded for lack of memory, by whatever they say of it."""
    from acemerge.checkpoints.machine import limit as limit_of
    from acemerge.errors import shortage_of

    limit = limit_of("RLIMIT_AS")
    limited = limit is not None and not isinstance(failure, ModuleNotFoundError)
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
