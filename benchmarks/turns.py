"""The parent's half of a measurement: two children that take turns, never at the same time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from shapes import Case

HERE = Path(__file__).parent
ROOT = HERE.parent
SIDES = {  # implementation: interpreter, script
    "ours": (".venv", "ours.py"),
    "ace": (".venv", "ours.py"),
    "naive": (".venv", "naive.py"),
    "fusionbench": (".peers", "peers.py"),
    "mergekit": (".peers", "peers.py"),
}
START_LIMIT = 600.0  # seconds for imports and inputs
PAUSE = 0.05  # between turns, for the other side's idle threads to go to sleep


class ChildError(Exception):
    """A child that failed, died or took too long; the message goes into the table."""


@dataclass
class Measured:
    """One side of a row. Times in seconds, `runs` as measured: one list per part of the job. `others` is the
    share of the processors that other processes took, by run; 0 for runs too short to tell."""

    runs: list[list[float]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    added_mb: float = math.nan
    gflops: float = 0.0
    symmetric_gflops: float = 0.0
    eigh: float = math.inf
    status: str = ""
    error: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return min(self._whole, default=math.nan)

    @property
    def median(self) -> float:
        return statistics.median(self._whole or [math.nan])

    @property
    def noise(self) -> float:
        """The share of the processors that others took during the best run."""
        return min(zip(self._whole, self.others, strict=True))[1] if self._whole else 0.0

    @property
    def extrapolated(self) -> bool:
        return "extrapolate" in self.about

    @property
    def floor(self) -> float:
        """Seconds that the operations take at the measured rates of general and of symmetric products, and that its
        eigen-decompositions take LAPACK.
        """
        if not self.gflops or "flop" not in self.about:
            return math.nan
        symmetric, eighs = float(self.about["symmetric"]), int(self.about["eighs"])
        products = (float(self.about["flop"]) - symmetric) / self.gflops + symmetric / self.symmetric_gflops
        return products / 1e9 + (eighs * self.eigh if eighs else 0.0)

    @property
    def _whole(self) -> list[float]:
        """Seconds of the whole job by every run: where a few steps and some more were timed, those of all."""
        if self.error:
            return []
        if self.extrapolated:
            return [more + (more - few) * float(self.about["extrapolate"]) for few, more in self.runs]
        return [whole for (whole,) in self.runs]


class Child:
    """One implementation with one job, in a process of its own with fixed threads."""

    def __init__(self, side: str, case: Case, threads: int, log: IO[bytes]) -> None:
        environment, script = SIDES[side]
        python = ROOT / environment / "bin" / "python"
        if not python.exists():
            raise ChildError(f"no {environment}: run benchmarks/setup_peers.sh")
        count = str(threads)
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        self._log = log
        self._process = subprocess.Popen(
            [python, str(HERE / script), case.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            bufsize=0,
        )
        self._pending = b""

    def close(self) -> None:
        """End the process, whatever it is doing; may be called again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, request: str, limit: float) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        try:
            self._process.stdin.write(request.encode() + b"\n")
        except BrokenPipeError:
            raise ChildError(self._last_words()) from None
        return self.answer(limit)

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line of JSON; ChildError when none comes in time, or when it is an error."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ChildError(f"over {limit:.0f} s")
            chunk = self._process.stdout.read(65536)
            if not chunk:
                raise ChildError(self._last_words())
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ChildError(reply["error"])
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"died with {self._process.wait()}: {lines[-1][:120] if lines else ''}"


@dataclass(frozen=True)
class Limits:
    """How often and how long: `run` seconds after which a run is given up, at least `repeats` runs of what is
    short, and more of them until they fill `fill` seconds."""

    run: float = 900.0
    repeats: int = 3
    fill: float = 2.0

    def count(self, took: float) -> int:
        """Repeats of what took `took` seconds the first time."""
        if took > 60:
            return 0
        if took > 20:
            return 1
        return max(self.repeats, min(30, math.ceil(self.fill / max(took, 1e-6))))


@dataclass
class Side:
    """A child and what is known of it so far."""

    child: Child | None
    measured: Measured
    limits: Limits
    left: int = 0

    def turn(self, request: str) -> dict[str, Any]:
        """One request; a failure ends this side's part and its process, and is noted."""
        if self.child is None or self.measured.error:
            return {}
        try:
            return self.child.ask(request, self.limits.run)
        except ChildError as failure:
            self.measured.error = str(failure)
            self.child.close()
            return {}

    def first(self) -> None:
        """The warm-up: memory, and how often to repeat; a run over a minute counts itself."""
        reply = self.turn("first")
        if not reply:
            return
        self.measured.added_mb, self.measured.status = reply["added_mb"], reply["status"]
        took = sum(reply["seconds"])
        self.left = self.limits.count(took)
        if self.left == 0:
            self._note(reply)

    def again(self) -> None:
        if self.left > 0:
            self.left -= 1
            reply = self.turn("again")
            if reply:
                self._note(reply)

    def _note(self, reply: dict[str, Any]) -> None:
        self.measured.runs.append(reply["seconds"])
        self.measured.others.append(reply.get("others", 0.0))

    def rate(self) -> None:
        found, own = self.turn("rate"), self.measured
        own.gflops = max(own.gflops, found.get("gflops", 0.0))
        own.symmetric_gflops = max(own.symmetric_gflops, found.get("symmetric_gflops", 0.0))
        own.eigh = min(own.eigh, found.get("eigh", math.inf))


def compare(cases: dict[str, Case], threads: int, limits: Limits) -> tuple[dict[str, Measured], float]:
    """Measure one case per implementation, turn by turn, and the distance between the results.

    Args:
        cases: by implementation; the first is the reference of the distance.
    """
    with contextlib.ExitStack() as stack:
        sides = {name: _start(name, case, threads, limits, stack) for name, case in cases.items()}
        for side in sides.values():
            side.rate()
        for side in sides.values():
            side.first()
        while any(side.left and not side.measured.error for side in sides.values()):
            for side in sides.values():
                side.again()
        for side in sides.values():
            side.rate()
        return {name: side.measured for name, side in sides.items()}, _difference(list(sides.values()))


def _start(name: str, case: Case, threads: int, limits: Limits, stack: contextlib.ExitStack) -> Side:
    side = Side(None, Measured(), limits)
    try:
        log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        side.child = Child(name, case, threads, log)
        stack.callback(side.child.close)
        reply = side.child.answer(START_LIMIT)
    except ChildError as failure:
        side.measured.error = str(failure)
        return side
    side.measured.about = {**reply["about"], "can_save": reply["can_save"]}
    return side


def _difference(sides: list[Side]) -> float:
    """`||a - b|| / ||b||` of the merged updates, b the first side's; NaN where there is nothing to compare."""
    if len(sides) != 2 or any(side.measured.error or not side.measured.about["can_save"] for side in sides):
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.npy" for i in range(2)]
        try:
            for side, path in zip(sides, paths, strict=True):
                assert side.child is not None
                side.child.ask(f"save {path}", side.limits.run)
        except ChildError:  # the times stand
            return math.nan
        reference, other = (np.load(path, mmap_mode="r") for path in paths)
        return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))
