"""The command `acemerge`: what must be settled before torch is imported."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> None:
    # Threads that wait by spinning take the processors from each other: with anything else at work on the machine,
    # small products become several times slower. On an idle one it makes no difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)  # an import may swallow an exception
    from acemerge.cli import main as run

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run()


def _quit(*_: object) -> NoReturn:
    os.write(2, b"acemerge: error: interrupted: nothing was done; run the same command again\n")
    os._exit(130)


if __name__ == "__main__":
    main()
