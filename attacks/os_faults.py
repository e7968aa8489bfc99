"""Row 19: the k-th call to the operating system fails, once or from then on, or does one byte only; for every k."""

from __future__ import annotations

import errno
import shutil
from functools import partial
from pathlib import Path

from acemerge.errors import AcemergeError
from acemerge.output.names import OLD
from acemerge.output.verify import verify
from attacks.faulty import CODES, Fault, failing, faulty, short, unfaulty
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, published, snapshot

ROW, FULL = 19, 100_000  # more than there are: every call of every kind of fault


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Each fault at every k until a run is not touched by it, or, with fewer to try, at places spread over the run."""
    tally = Tally()
    kinds: list[tuple[str, Fault, bool]] = [("short", short, True)]
    for code in CODES:
        kinds += [(errno.errorcode[code], failing(code), lasting) for lasting in (False, True)]
    for i, (name, fault, lasting) in enumerate(kinds):
        case = Case(folder / f"{i}", "emr")
        calls = _calls(case)
        step = max(1, calls * len(kinds) // count)
        for k in range(1 + seed % step, calls + 1, step):
            label = f"{name}{' from' if lasting else ' at'} call {k} of {calls}"
            clean(tally, label, partial(_fail_and_go_on, case, k, fault, lasting))
    return tally


def _calls(case: Case) -> int:
    case.merge_earlier(case.folder / "out")
    with faulty(0, unfaulty) as counting:
        case.merge(case.folder / "out", overwrite=True)
    return counting.count


def _fail_and_go_on(case: Case, k: int, fault: Fault, lasting: bool) -> None:
    """The failure is one typed error, the earlier output is whole, and the next run gives what it should."""
    out = case.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    earlier = case.merge_earlier(out)
    failure = None
    try:
        with faulty(k, fault, lasting):
            case.merge(out, overwrite=True)
    except AcemergeError as error:
        failure = error
    if failure and not lasting:
        check(published(out, earlier) == earlier, "the earlier output is not as it was")
        verify(out)
    elif (out / "acemerge.json").exists():
        verify(out)  # while nothing works any more, nothing half done may look finished
    else:
        kept = {name.removesuffix(OLD) for name in snapshot(out)}
        check(earlier.keys() <= kept, "a file of the earlier output is gone")
    try:
        case.merge(out, resume=True, overwrite=True)
    except AcemergeError as error:
        raise AssertionError(f"cannot go on: {error}") from error
    case.check_output(out)
    if failure:
        raise failure


if __name__ == "__main__":
    main(("os_faults",))
