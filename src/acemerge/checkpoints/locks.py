"""Locks of folders, on every system."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.errors import AcemergeError, LockedError, WriteError

_MOMENT, _POLLED = 5.0, 0.02  # seconds that a lock may be in passing hands, and between two looks at it


@contextlib.contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold `path` as the lock of its folder. The system lets go of it when the process dies.

    Several may hold it `shared`, and nobody else then: each has a file of its own beside it, `NAME-...`, for a lock
    that is shared is not on every system, and takes `path` itself for a moment only.
    """
    if not shared:
        with _held(path, 0.0):
            _end_shares(path)
            yield
        return
    with _held(path, _MOMENT):
        own = path.with_name(f"{path.name}-{uuid.uuid4().hex[:12]}")
        share = _held(own, 0.0)
        share.__enter__()
    with contextlib.ExitStack() as stack:
        stack.push(share)
        yield


@contextlib.contextmanager
def _held(path: Path, patience: float) -> Iterator[None]:
    """Hold a file by itself, and remove it after; where another has it, LockedError after so many seconds."""
    from filelock import lock_descriptor

    until = time.monotonic() + patience
    while True:
        with files.writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | files.OWN, 0o644)
        try:
            taken = lock_descriptor(descriptor, blocking=False)
            if taken and _is_same_file(descriptor, path):
                break
        except OSError as failure:
            files.close(descriptor)
            raise WriteError(path, files.reason_of(failure), "choose a folder on another disk") from failure
        files.close(descriptor)  # else the last holder removed the file between our open and our lock
        if not taken and time.monotonic() >= until:
            raise LockedError(path.parent, "another run is writing here", "wait for it or choose another folder")
        if not taken:
            time.sleep(_POLLED)
    try:
        yield
    finally:
        _let_go(descriptor, path)


def _let_go(descriptor: int, path: Path) -> None:
    """Remove a lock's file while it is held, so that nobody holds it then; after that where no open file is removed."""
    with contextlib.suppress(AcemergeError):
        try:
            os.unlink(path)
        except PermissionError:
            files.close(descriptor)
            files.remove(path)
            return
        except OSError:
            pass
    files.close(descriptor)


def _end_shares(path: Path) -> None:
    """LockedError where somebody has a share of the lock; what those left who died is removed."""
    for name in files.list_folder(path.parent):
        if name.startswith(f"{path.name}-"):
            with _held(path.with_name(name), 0.0):
                pass


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
