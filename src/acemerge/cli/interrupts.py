"""Interrupts that are not lost: Python drops what a signal's handler raises while an object is finalized."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_MOMENT = 0.001  # seconds until what was dropped is raised again: the finalizer is over by then
TERMINATED = 128 + signal.SIGTERM  # the code of a SystemExit that a signal asks for


def is_interrupt(failure: BaseException | None) -> bool:
    return isinstance(failure, KeyboardInterrupt) or (isinstance(failure, SystemExit) and failure.code == TERMINATED)


class _Dropped:
    """The interrupt that was dropped, until it is raised again."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._told = sys.unraisablehook
        self._noting = False

    def note(self, found: sys.UnraisableHookArgs) -> None:
        """What Python calls with every failure that it drops."""
        if not is_interrupt(found.exc_value):
            self._told(found)
            return
        self._noting = True
        self.failure = found.exc_value
        _wake_in(_MOMENT)
        self._noting = False

    def raise_again(self, *_: object) -> None:
        """The handler of the timer. What it raises in `note` would be dropped for good."""
        if self._noting:
            _wake_in(_MOMENT)
            return
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def _wake_in(seconds: float) -> None:
    with contextlib.suppress(AttributeError):  # a system without such timers
        signal.setitimer(signal.ITIMER_REAL, seconds)


@contextlib.contextmanager
def _on_waking(handle: Callable[..., None]) -> Iterator[None]:
    """The handler of the timer within, where there is one."""
    try:
        alarm = signal.SIGALRM
    except AttributeError:
        yield
        return
    handler = signal.signal(alarm, handle)
    try:
        yield
    finally:
        _wake_in(0)
        signal.signal(alarm, handler)


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """An interrupt that is dropped within is raised again a moment later, or at the end."""
    if threading.current_thread() is not threading.main_thread():  # no other gets any
        yield
        return
    dropped = _Dropped()
    hook, sys.unraisablehook = sys.unraisablehook, dropped.note
    try:
        with _on_waking(dropped.raise_again):
            yield
    finally:
        sys.unraisablehook = hook
    if dropped.failure is not None:
        raise dropped.failure
