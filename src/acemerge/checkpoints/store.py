"""What a store of objects is asked for, and how often: every call is repeated where its failure may pass.

A store's failures come as one type, in words of our own: what libraries say may hold keys, tokens and addresses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")
# missing: no such object. exists: there is one already. changed: it is not the one that was asked for. refused: no
# access. passing: anything that may go well the next time.
Kind = Literal["missing", "exists", "changed", "refused", "passing"]
_TIMES = 6
_FIRST_WAIT = 0.1  # seconds, doubled each time


class StoreFailure(Exception):  # noqa: N818  it is caught and told by type, never raised to a user
    """What a store answered, or that it did not."""

    def __init__(self, kind: Kind, said: str) -> None:
        self.kind, self.said = kind, said
        super().__init__(said)


@dataclass(frozen=True)
class Stat:
    """An object's size and what changes when it is replaced."""

    size: int
    etag: str = ""
    version: str = ""


@dataclass(frozen=True)
class Listing:
    """What lies directly under a prefix: objects with their stats, and the names of further prefixes."""

    objects: dict[str, Stat]
    folders: tuple[str, ...]


class Store(Protocol):
    """One bucket. Every call is one request, or raises StoreFailure."""

    def stat(self, key: str) -> Stat: ...

    def listing(self, prefix: str) -> Listing: ...

    def read(self, key: str, start: int, end: int, expected: Stat) -> bytes:
        """These bytes of an object as it was when `expected` was taken; `changed` where it is another now."""
        ...

    def put(self, key: str, data: bytes, new: bool = False) -> Stat:
        """Write a small object at once; if it must be `new`, `exists` where there is one."""
        ...

    def upload(self, key: str, file: Path) -> Stat:
        """Write an object from a file, in parts. It is there when all is there."""
        ...

    def delete(self, key: str) -> None:
        """That it is gone already is fine."""
        ...


def persistently(call: Callable[[], T]) -> T:
    """The call's result, tried again a few times, each after a longer while, where a failure may pass."""
    for i in range(_TIMES - 1):
        try:
            return call()
        except StoreFailure as failure:
            if failure.kind != "passing":
                raise
        time.sleep(_FIRST_WAIT * 2**i * random.uniform(0.5, 1.5))
    return call()
