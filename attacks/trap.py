"""What the interpreter itself reports that it does: opened files, started programs, compiled code."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attacks.harness import check

_LOOKING = ("open", "os.listdir", "os.scandir")
# Any of these starts a program, or asks an address.
_RUNNING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
_ASKING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")

# An event and its arguments -> why it is a breach, or an empty string.
Judge = Callable[[str, tuple[Any, ...]], str]

_judges: list[tuple[Judge, list[str]]] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for judge, seen in tuple(_judges):
        breach = judge(event, arguments)
        if breach:
            seen.append(breach)


@contextlib.contextmanager
def watching(judge: Judge) -> Iterator[list[str]]:
    """The breaches that `judge` sees while the block runs. The hook itself stays for good, and sleeps."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    seen: list[str] = []
    watcher = (judge, seen)
    _judges.append(watcher)
    try:
        yield seen
    finally:
        _judges.remove(watcher)


def confined(folder: Path, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with a breach for whatever it opens or lists outside `folder`, for a program or an address."""
    code = [str(Path(path).resolve()) for path in {*sys.path, sysconfig.get_path("stdlib")} if path]

    def judge(event: str, arguments: tuple[Any, ...]) -> str:
        if event in (*_RUNNING, *_ASKING):
            return f"{event} {arguments}"
        if event not in _LOOKING or not isinstance(arguments[0], str | bytes | os.PathLike):
            return ""  # a descriptor that is open already
        path = os.path.realpath(os.fsdecode(arguments[0]).replace("\0", ""))
        inside = any(path == home or path.startswith(home + os.sep) for home in (str(folder), *code))
        kernel = path.startswith("/proc/self/") or path == "/proc/cpuinfo"  # of this machine, and of nobody else
        return "" if inside or kernel else f"{event} of {path}"

    def watched() -> None:
        with watching(judge) as seen:
            try:
                call()
            finally:
                check(not seen, f"went out of the folder: {seen[:3]}")

    return watched
