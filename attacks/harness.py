"""What every attack shares: how outcomes are counted, a process of its own, and the command line.

An attack is a module with `ROW` (its row in RELIABILITY.md), `FULL` (its full count) and
`attack(folder, count, seed) -> Tally`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from acemerge.errors import AcemergeError

LIMIT_SECONDS = 10.0  # of work: a clock tells of what else the machine does, too
LIMIT_WAITED = 120.0  # by the clock
Must = Literal["refuse", "accept", "either"]
HEADINGS = ("row", "attack", "tried", "refused cleanly", "valid", "broken", "seconds")


@dataclass
class Tally:
    """What came of an attack. `broken` says of each breach what it was."""

    tried: int = 0
    refused: int = 0
    valid: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.refused += other.refused
        self.valid += other.valid
        self.broken += other.broken


def clean(
    tally: Tally, label: str, call: Callable[[], object], must: Must = "either", meter: Meter | None = None
) -> None:
    """Run `call` and count it: one printable line of an AcemergeError is a clean refusal, a return is valid.

    All else is a breach: another exception, more than the limits or the meter allow, or not what it `must` do.
    """
    tally.tried += 1
    started, worked = time.monotonic(), _worked()
    if meter:
        meter.start()
    try:
        call()
        outcome = "valid" if must != "refuse" else "accepted"
    except AcemergeError as refusal:
        outcome = "refused" if must != "accept" else f"refused: {refusal}"
        if not str(refusal).isprintable():
            outcome = f"more than one line: {str(refusal)!r}"
    except (Exception, SystemExit) as failure:
        outcome = f"{type(failure).__name__}: {failure}"
    excess = meter.excess() if meter else ""
    waited, seconds = time.monotonic() - started, _worked() - worked
    if waited > LIMIT_WAITED or seconds > LIMIT_SECONDS:
        excess = f"took {waited:.1f} s, {seconds:.1f} s of processor time"
    if excess or outcome not in ("refused", "valid"):
        tally.broken.append(f"{label}: {excess or outcome[:300]}")
    elif outcome == "refused":
        tally.refused += 1
    else:
        tally.valid += 1


def _worked() -> float:
    """Seconds that this process and those it has waited for were at work."""
    return sum(os.times()[:4])


def check(condition: bool, what: str) -> None:
    """An assertion that python -O does not remove: a breach, where `clean` runs it."""
    if not condition:
        raise AssertionError(what)


# --- a process of its own -----------------------------------------------------------------------------------


def in_child(call: Callable[..., Tally], *arguments: Any, timeout: float) -> Tally:
    """Run `call(*arguments)` in a new process. That it dies or does not answer in time is a breach."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, call, arguments))
    process.start()
    sender.close()
    label = f"{call.__module__}.{call.__name__}{arguments[1:]}"
    try:
        if not receiver.poll(timeout):
            return Tally(1, broken=[f"{label}: no answer within {timeout:g} s"])
        answer = receiver.recv()
        return answer if isinstance(answer, Tally) else Tally(1, broken=[f"{label}: {answer}"])
    except EOFError:
        process.join(60)
        return Tally(1, broken=[f"{label}: the process died, {_cause(process.exitcode)}"])
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, call: Callable[..., Tally], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # what libraries say of odd input is not for the terminal
    try:
        sender.send(call(*arguments))
    except Exception as failure:  # a defect of the attack itself must not look like a death
        sender.send(f"{type(failure).__name__}: {failure}")


def _cause(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


class Meter:
    """What a call may take: seconds of this process, and bytes of memory above those before it, at the peak.

    Linux alone tells a peak anew; the memory of a process with other work would be counted too. What other work has
    left here is kept from the collector, which would spend half a second on going through it.
    """

    def __init__(self, seconds: float, nbytes: int) -> None:
        self.seconds, self.nbytes = seconds, nbytes
        self._started, self._before = 0.0, 0

    def start(self) -> None:
        gc.freeze()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self._before, self._started = _kilobytes("VmRSS"), time.process_time()

    def excess(self) -> str:
        """What was too much since the start; empty where nothing was."""
        seconds = time.process_time() - self._started
        gc.unfreeze()
        added = (_kilobytes("VmHWM") - self._before) * 1024
        if seconds > self.seconds:
            return f"took {seconds:.2f} s of processor time"
        return f"took {added / 1e6:.0f} MB" if added > self.nbytes else ""


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


# --- the command line ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One attack's line of the table."""

    row: int
    name: str
    tally: Tally
    seconds: float

    def line(self) -> str:
        tally = self.tally
        cells = (self.row, self.name, tally.tried, tally.refused, tally.valid, len(tally.broken), f"{self.seconds:.1f}")
        return f"| {' | '.join(map(str, cells))} |"


def run(name: str, count: int | None, seed: int) -> Result:
    """Run one attack in a folder of its own."""
    module = importlib.import_module(f"attacks.{name}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"attack-{name}-") as folder:
        tally = module.attack(Path(folder).resolve(), count or module.FULL, seed)
    return Result(module.ROW, name, tally, time.monotonic() - started)


def main(names: tuple[str, ...], argv: list[str] | None = None) -> None:
    """Run attacks, print one Markdown table and every breach, and exit with 1 where there is any."""
    parser = argparse.ArgumentParser(description="attack acemerge and count what came of it")
    parser.add_argument("--count", type=int, help="cases for each attack [default: its full count]")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    print("| " + " | ".join(HEADINGS) + " |\n|" + "--|" * len(HEADINGS))
    broken = []
    for name in names:
        result = run(name, asked.count, asked.seed)
        broken += [f"{name}: {breach}" for breach in result.tally.broken]
        print(result.line(), flush=True)
    for breach in broken[:50]:
        print(breach, file=sys.stderr)
    if len(broken) > 50:
        print(f"and {len(broken) - 50} more", file=sys.stderr)
    sys.exit(1 if broken else 0)
