"""The pieces in which a job is done: all of its tensor, or ranges of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, Literal, TypeVar

from acemerge.planning.jobs import AnyJob, Job, Merge, MergeByToken

# Entries of all models together in one piece: few enough to be one thread's work while others do theirs.
_PIECE = 1 << 23
# So few that calling for the work takes as long as the work.
_TINY = 1 << 18

Load = Literal["tiny", "medium", "large"]
_AnyJob_co = TypeVar("_AnyJob_co", bound=Job, covariant=True)


@dataclass(frozen=True)
class Piece(Generic[_AnyJob_co]):
    """A job, or a range of its tensor's rows.

    `beside` are jobs of other plans that want the same inputs, to be worked on while these are there.
    """

    job: _AnyJob_co
    rows: tuple[int, int] | None = None
    beside: tuple[_AnyJob_co, ...] = ()

    @property
    def each(self) -> tuple[Piece[_AnyJob_co], ...]:
        """This one and those beside it, one by one."""
        return (self,) if not self.beside else tuple(Piece(job, self.rows) for job in (self.job, *self.beside))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.job.spec.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @property
    def first_row(self) -> int:
        return self.rows[0] if self.rows else 0

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_in(self) -> int:
        return self.job.bytes_in * self.count // max(1, self.job.spec.count)

    @property
    def load(self) -> Load:
        """How to compute it. Known from the piece alone: its bits may depend on how many threads do it."""
        return "tiny" if self._entries <= _TINY else "medium" if self._entries <= _PIECE else "large"

    @property
    def stack(self) -> int:
        """How many pieces like this one may be worked on at once: as many as are small together."""
        return max(1, _TINY // max(1, self._entries))

    @property
    def _entries(self) -> int:
        """Of all models together."""
        return self.count * _models(self.job)

    @property
    def is_last(self) -> bool:
        return self.rows is None or self.rows[1] == self.job.spec.shape[0]


def pieces(job: AnyJob, split: bool) -> Iterator[Piece[AnyJob]]:
    """The job in ranges of rows if it is to be split and larger than one range, else in one piece."""
    # Factors are no rows of the tensor, and a token's row is another one in each model.
    whole = isinstance(job, MergeByToken) or (isinstance(job, Merge) and any(job.updates))
    rows = job.spec.shape[0] if split and job.spec.shape and not whole else 0
    step = max(1, _PIECE // (_models(job) * max(1, job.spec.count // max(1, rows))))
    if rows <= step:
        yield Piece(job)
        return
    for first in range(0, rows, step):
        yield Piece(job, (first, min(first + step, rows)))


def common_pieces(jobs: Sequence[AnyJob]) -> Iterator[Piece[AnyJob]]:
    """The pieces of jobs of several plans for one tensor, together where they read the same and are as large."""
    groups: dict[object, list[list[Piece[AnyJob]]]] = {}
    for job in jobs:
        own = list(pieces(job, job.entrywise))
        kind = job.inputs, job.bytes_in, tuple(piece.rows for piece in own), own[0].load
        groups.setdefault(kind, []).append(own)
    for first, *others in groups.values():
        for i, piece in enumerate(first):
            yield replace(piece, beside=tuple(own[i].job for own in others))


def _models(job: Job) -> int:
    """The base and the experts, and further copies: so many tensors of its shape are worked with."""
    low_rank = isinstance(job, Merge) and job.keeps_low_rank
    return 1 + (0 if low_rank else len(job.sources)) + len(job.copies)
