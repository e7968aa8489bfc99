"""Bounds on the work of code that builds what a file describes: the parts that it makes, and its seconds."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as registration


class TooMuchWork(BaseException):
    """Raised within the code that is bounded. No `except Exception` there may hold it."""


class TooManyParts(TooMuchWork):
    """More modules, parameters and buffers than were allowed."""


class TooManySeconds(TooMuchWork):
    """The code was at it for too long."""


@contextlib.contextmanager
def bounded(parts: int, seconds: float) -> Iterator[None]:
    """What this thread does in the block ends with TooMuchWork when it has gone too far.

    Parts are counted before they are a module's: the same ones on every machine. The seconds are for loops that make
    none; a single call into compiled code ends before it is stopped.
    """
    with _parts_counted(parts), _until(seconds):
        yield


@contextlib.contextmanager
def _parts_counted(most: int) -> Iterator[None]:
    thread, count = threading.get_ident(), 0

    def one_more(_module: nn.Module, _name: str, _part: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise TooManyParts

    hooks = (
        registration.register_module_module_registration_hook(one_more),
        registration.register_module_parameter_registration_hook(one_more),
        registration.register_module_buffer_registration_hook(one_more),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _until(seconds: float) -> Iterator[None]:
    thread, lock = threading.get_ident(), threading.Lock()
    ended = fired = False

    def stop() -> None:
        nonlocal fired
        with lock:
            if not ended:
                _raise_in(thread, TooManySeconds)
                fired = True

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
        if fired:  # nothing of it may be raised behind the block
            _raise_in(thread, None)


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Have a thread raise between two of its steps; None takes back what it has not raised yet."""
    value = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
