"""Who may hold a folder beside whom."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acemerge.checkpoints import locks
from acemerge.errors import LockedError

HOLD = """
import sys, pathlib
from acemerge.checkpoints import locks
with locks.lock(pathlib.Path(sys.argv[1]), shared=True):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def test_one_alone_or_several_with_a_share(lock: Path) -> None:
    with locks.lock(lock), pytest.raises(LockedError, match="another run is writing here; wait"), locks.lock(lock):
        pass
    with locks.lock(lock, shared=True), locks.lock(lock, shared=True):
        with pytest.raises(LockedError, match="another run is writing here; wait"), locks.lock(lock):
            pass
        assert len(os.listdir(lock.parent)) == 2  # a file for each share, and none of who was refused
    assert not os.listdir(lock.parent)


def test_a_share_waits_for_a_moment_only(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_MOMENT", 0.1)
    with locks.lock(lock):
        started = time.monotonic()
        with pytest.raises(LockedError), locks.lock(lock, shared=True):
            pass
        assert time.monotonic() - started >= 0.1


def test_a_failure_lets_go(lock: Path) -> None:
    for shared in (False, True):
        with contextlib.suppress(ZeroDivisionError), locks.lock(lock, shared):
            _ = 1 // 0
        assert not os.listdir(lock.parent)


def test_what_a_killed_process_left_locks_nothing(lock: Path) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with held:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        with pytest.raises(LockedError), locks.lock(lock):
            pass
        held.kill()
        held.wait()
    assert os.listdir(lock.parent)
    with locks.lock(lock):
        assert os.listdir(lock.parent) == [lock.name]
