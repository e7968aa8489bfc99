"""What the interpreter itself reports that it does: opened files, started programs, compiled code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

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
