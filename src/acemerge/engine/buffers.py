"""Large buffers that are used again: fresh memory costs more to map than to fill."""

from __future__ import annotations

import mmap
from threading import Lock

import torch

from acemerge.shapes import Tensor

# A buffer may serve for something smaller, but not much: the rest would be lost to the budget.
_SLACK = 1.5
# Smaller ones are left to the C library. Larger ones that are free it would cut up: small objects in them keep it from
# joining the rest again, and it would have more of them with every batch.
_LEAST = 1 << 16


class Buffers:
    """Idle buffers, the longest idle first, with those in use no more bytes than `keep` last said. For any thread."""

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._limit = self._in_use = 0
        self._lock = Lock()

    def take(self, nbytes: int) -> Tensor:
        """A buffer of `nbytes` (uint8), whatever is in it."""
        if nbytes < _LEAST:
            return torch.empty(nbytes, dtype=torch.uint8)
        with self._lock:
            fitting = [b for b in self._idle if nbytes <= len(b) <= _SLACK * nbytes]
            if fitting:
                best = min(fitting, key=len)
                self._idle = [b for b in self._idle if b is not best]
                self._in_use += len(best)
                return best
            self._in_use += nbytes
            self._evict()  # before the new one is there
        # Of its own, and not the C library's: that keeps what one thread frees from the others.
        return torch.frombuffer(mmap.mmap(-1, nbytes, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back. Nothing that was made of it may be used any more."""
        if len(buffer) < _LEAST:
            return
        with self._lock:
            self._in_use -= len(buffer)
            self._idle.append(buffer)
            self._evict()

    def keep(self, limit: int) -> None:
        """Let go of idle buffers where they and those in use are more than `limit` bytes."""
        with self._lock:
            self._limit = limit
            self._evict()

    def _evict(self) -> None:
        excess = self._in_use + sum(map(len, self._idle)) - self._limit
        while self._idle and excess > 0:
            excess -= len(self._idle.pop(0))
