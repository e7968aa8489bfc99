"""The fault seam: the k-th call that `acemerge.checkpoints.files` makes to the operating system goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from threading import Lock
from types import ModuleType
from typing import Any

from acemerge.checkpoints import files

# Given the real call and its arguments, does something else.
Fault = Callable[..., Any]


class FaultyOs:
    """Stands for the module `os`: counts calls and gives the k-th, and with `lasting` all after it, to `fault`."""

    def __init__(self, k: int, fault: Fault, lasting: bool = False) -> None:
        self.count = 0
        self._k, self._fault, self._lasting, self._lock = k, fault, lasting, Lock()

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if not callable(value) or isinstance(value, type | ModuleType):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                hit = self.count == self._k or (self._lasting and self.count > self._k)
            return (self._fault if hit else unfaulty)(value, *arguments, **options)

        return call


def unfaulty(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return call(*arguments, **options)


@contextlib.contextmanager
def faulty(k: int, fault: Fault, lasting: bool = False) -> Iterator[FaultyOs]:
    """Replace the seam's `os` while the block runs."""
    stand_in = FaultyOs(k, fault, lasting)
    real, files.os = files.os, stand_in  # type: ignore[assignment]
    try:
        yield stand_in
    finally:
        files.os = real


def failing(code: int) -> Fault:
    """The call fails with this errno; one that lets go of something has done so all the same."""

    def fault(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if call is os.close:
            call(*arguments, **options)
        raise OSError(code, os.strerror(code))

    return fault


def short(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A read or a write that does one byte only; other calls are as ever."""
    if call is os.write:
        descriptor, data = arguments
        return os.write(descriptor, data[:1])
    if call is os.preadv:
        descriptor, buffers, offset = arguments
        return os.preadv(descriptor, [buffers[0][:1]], offset)
    return call(*arguments, **options)


def killing(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The process is killed before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


CODES = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EROFS)
