"""One piece of work at a time, in a thread of its own: how far it is, what came of it, and an end to it on demand."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from acemerge.engine.execute import OnProgress, Progress
from acemerge.errors import AcemergeError, UsageError, printable, shortage_of

Phase = Literal["running", "stopping", "done", "failed", "stopped"]


@dataclass(frozen=True)
class State:
    """Of the last piece of work. `result` is there when it is done, `error` when it failed.

    `seconds` since its present stage began, a stage being what `progress` counts from its beginning to its end. `of` is
    what was picked for it.
    """

    number: int
    what: str
    phase: Phase
    progress: Progress | None = None
    seconds: float = 0.0
    result: Any = None
    error: str = ""
    of: Any = None

    @property
    def is_busy(self) -> bool:
        return self.phase in ("running", "stopping")


class Stopped(Exception):  # noqa: N818
    """Raised within the work where it tells of its progress, when it is to end."""


class Runner:
    """Runs one piece of work at a time. `state` is the last one's, None until the first; `last` has that of every kind,
    and `results` are those of all that is done.
    """

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._state: State | None = None
        self._before: dict[str, State] = {}
        self._stage_began = 0.0

    @property
    def state(self) -> State | None:
        with self._lock:
            return self._state

    def last(self, what: str) -> State | None:
        """Where the last work of this kind stands, or how it ended."""
        with self._lock:
            return self._state if self._state is not None and self._state.what == what else self._before.get(what)

    def start(self, what: str, work: Callable[[OnProgress], Any], of: Any = None) -> None:
        """Begin; UsageError while something else runs. `work` tells of its progress, which is where it is stopped."""
        with self._lock:
            self._next(what, "running", of)
            self._stop.clear()
            self._stage_began = time.monotonic()
            self._thread = threading.Thread(target=self._run, args=(work,), name=f"acemerge-ui-{what}")
            self._thread.start()

    def refuse(self, what: str, failure: BaseException, of: Any = None) -> None:
        """Work that failed before it began; UsageError while something else runs."""
        with self._lock:
            self._next(what, "failed", of, error=line(failure))

    def _next(self, what: str, phase: Phase, of: Any, error: str = "") -> None:
        if self._state is not None and self._state.is_busy:
            raise UsageError("page", f"{self._state.what} is running", "wait for it, or stop it")
        if self._state is not None:
            self._before[self._state.what] = self._state
        self._state = State((self._state.number if self._state else 0) + 1, what, phase, error=error, of=of)

    def stop(self) -> None:
        """Ask the work to end at its next tensor. What it has written by then is done away with."""
        self._stop.set()
        with self._lock:
            if self._state is not None and self._state.phase == "running":
                self._state = replace(self._state, phase="stopping")

    def wait(self) -> None:
        """Until nothing runs."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, work: Callable[[OnProgress], Any]) -> None:
        try:
            self._end("done", result=work(self._on_progress))
        except Stopped:
            self._end("stopped")
        except BaseException as failure:
            self._end("failed", error=line(failure))

    def _on_progress(self, progress: Progress) -> None:
        with self._lock:
            assert self._state is not None
            before, now = self._state.progress, time.monotonic()
            if before is None or before.stage != progress.stage:
                self._stage_began = self._stage_began if before is None else now
            self._state = replace(self._state, progress=progress, seconds=now - self._stage_began)
        if self._stop.is_set():
            raise Stopped

    def _end(self, phase: Phase, **found: Any) -> None:
        with self._lock:
            assert self._state is not None
            self._state = replace(self._state, phase=phase, **found)
            if phase == "done":
                self.results[self._state.number] = self._state.result


def line(failure: BaseException) -> str:
    """What a person is told of a failure; of a defect of ours, more goes to standard error."""
    told = shortage_of(failure) or failure
    if isinstance(told, AcemergeError):
        return str(told)
    traceback.print_exception(failure, file=sys.stderr)
    what = printable(" ".join(f"{type(failure).__name__}: {failure}".split())[:300])
    return f"internal: {what}; see the terminal, and report it"
