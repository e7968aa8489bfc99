"""Row 18: kill -9 before the k-th call to the operating system, then --resume: the same bytes, and no orphans."""

from __future__ import annotations

import random
import shutil
import signal
from functools import partial
from pathlib import Path

from acemerge.output.names import OLD
from acemerge.output.verify import verify
from attacks.faulty import faulty, killing, unfaulty
from attacks.harness import Tally, check, clean, main
from attacks.merging import METHODS, Case, in_process, published

ROW, FULL = 18, 4000  # every call of every setting


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Kills spread over all calls of a run, for each method, one worker and two, a new output and an earlier one."""
    tally, rng = Tally(), random.Random(seed)
    settings = [(method, workers, over) for method in METHODS for workers in (1, 2) for over in (False, True)]
    for i, (method, workers, over) in enumerate(settings):
        case = Case(folder / f"{i}", method, workers)
        share = count // len(settings) + (i < count % len(settings))
        calls = _calls(case, over)
        step = max(1, calls // max(1, share))
        first = rng.randrange(step)
        for n in range(share):
            k = 1 + (first + n * step) % calls
            label = f"{method}, {workers} workers, call {k} of {calls}"
            clean(tally, label, partial(_kill_and_resume, case, k, over, rng), must="accept")
    return tally


def _calls(case: Case, over: bool) -> int:
    """How many calls an untroubled run makes."""
    out = case.folder / "counted"
    if over:
        case.merge_earlier(out)
    with faulty(0, unfaulty) as counting:
        case.merge(out, overwrite=over)
    shutil.rmtree(out)
    return counting.count


def _kill_and_resume(case: Case, k: int, over: bool, rng: random.Random) -> None:
    out = case.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    earlier = case.merge_earlier(out) if over else {}
    killed = _run_until_killed(case, out, k, {"overwrite": over})
    if (out / "acemerge.json").exists():
        verify(out)  # whatever has a manifest is a whole model
    elif over:
        old = {name.removesuffix(OLD) for name in published(out, {f"{n}{OLD}": b"" for n in earlier})}
        check(old | published(out, earlier).keys() == earlier.keys(), "a file of the earlier output is gone")
    if killed and rng.random() < 0.3:  # and once more while going on
        _run_until_killed(case, out, rng.randrange(1, 60), {"resume": True, "overwrite": over})
    case.merge(out, resume=True, overwrite=over and not (out / ".acemerge.journal").exists())
    case.check_output(out)


def _run_until_killed(case: Case, out: Path, k: int, options: dict[str, bool]) -> bool:
    process = in_process(_merge_and_die, case, out, k, options)
    process.join(60)
    check(process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}")
    return process.exitcode != 0


def _merge_and_die(case: Case, out: Path, k: int, options: dict[str, bool]) -> None:
    with faulty(k, killing):
        case.merge(out, **options)


if __name__ == "__main__":
    main(("kills",))
