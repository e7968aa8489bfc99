"""Row 20: two writers on one folder. One wins, the other is refused by the lock or by the finished output."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.output.verify import verify
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, in_process

ROW, FULL = 20, 100
_USAGE, _WRITE = 2, 5  # exit codes


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, case = Tally(), Case(folder, "ace")
    for trial in range(count):
        clean(tally, f"race {trial}", partial(_race, case, folder / f"out{trial}"), must="accept")
    return tally


def _race(case: Case, out: Path) -> None:
    start = multiprocessing.get_context("forkserver").Barrier(2)
    racers = [in_process(_merge_at, start, case, out) for _ in range(2)]
    for racer in racers:
        racer.join(60)
    codes = sorted(racer.exitcode if racer.exitcode is not None else 99 for racer in racers)
    check(codes[0] == 0 and codes[1] in (_USAGE, _WRITE), f"exit codes {codes}")
    verify(out)
    case.check_output(out)


def _merge_at(start: Any, case: Case, out: Path) -> None:
    start.wait()
    case.merge(out)


if __name__ == "__main__":
    main(("races",))
