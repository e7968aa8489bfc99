"""Row 24: SIGINT and SIGTERM at random moments: 130 or 143, one line that says how to go on, and --resume does."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, in_process

ROW, FULL = 24, 100
_LAYERS, _SIDE = 100, 48
_STOPPED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, rng = Tally(), random.Random(seed)
    case = Case(folder, "ace", layers=_LAYERS, side=_SIDE)
    started = time.monotonic()
    case.merge(folder / "timed")
    seconds = time.monotonic() - started
    for trial in range(count):
        number = (signal.SIGINT, signal.SIGTERM)[trial % 2]
        delay = rng.random() * seconds
        clean(tally, f"{number.name} after {delay:.3f} s", partial(_interrupt, case, number, delay), must="accept")
    return tally


def _interrupt(case: Case, number: signal.Signals, delay: float) -> None:
    out, errors, ready = case.folder / "out", case.folder / "errors", case.folder / "ready"
    shutil.rmtree(out, ignore_errors=True)
    ready.unlink(missing_ok=True)
    process = in_process(_command_line, case, out, errors, ready)
    while not ready.exists():
        check(process.is_alive(), "the process ended before it began")
        time.sleep(0.001)
    time.sleep(delay)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it was too late
        os.kill(process.pid, number)
    process.join(100)
    said = errors.read_text()
    if process.exitcode != 0:
        code, what = _STOPPED[number]
        check(process.exitcode == code, f"exit code {process.exitcode}, {said!r}")
        check(what in said and "--resume" in said and said.count("\n") == 1, f"said {said!r}")
        check(not (out / "acemerge.json").exists(), "published all the same")
    case.merge(out, resume=True)
    case.check_output(out)


def _command_line(case: Case, out: Path, errors: Path, ready: Path) -> None:
    from acemerge.cli.app import main as run
    from acemerge.cli.app import terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    words = ["merge", "--base", str(case.base), *(w for e in case.experts for w in ("--expert", str(e)))]
    with open(errors, "w", buffering=1) as sys.stderr:
        ready.touch()
        words += ["--method", case.options["method"], "--max-shard-size", case.options["max_shard_size"]]
        run([*words, "-o", str(out), "--quiet"])


if __name__ == "__main__":
    main(("interrupts",))
