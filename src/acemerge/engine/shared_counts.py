"""Counts of the whole model that the parts of a run take together, so that each tensor is read once for them.

A share is what lies in the files of one part. A part counts its own share first, then what nobody has begun, one share
at a time: so it goes with fewer processes than parts, down to one. For what another has begun it waits, though not for
long: that process may have died. There is no lock. Where two count one share, which they do if one was slow, both note
the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from acemerge.engine.execute import Layout, OnProgress, Progress
from acemerge.engine.opening import Opened
from acemerge.engine.thresholds import Count, Counts, Halves, Pool, counting, pools_of
from acemerge.engine.work import Walk
from acemerge.linalg.select import LOWER, UPPER
from acemerge.output.counts import CountNotes, Noted, Pass

_POLLED = 0.05, 1.0  # seconds between two looks: the first, and the longest
_PATIENCE, _TIMES = 2.0, 2.0  # what another has begun may take so many seconds, and so often what it would take here
_SLOW, _KNOWN = 5e-9, 1 << 28  # seconds for a byte of input, until so many bytes were counted here


@dataclass(frozen=True)
class Share:
    """What of each pool lies in the files of one part."""

    pools: tuple[Pool, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(job.bytes_in for pool in self.pools for job in pool.jobs)


def shares_of(layout: Layout, of: int) -> dict[int, Share]:
    """Those that are not empty, by the numbers of their parts."""
    files = zip(layout.every, layout.spread_over(of), strict=True)
    owner = {spec.name: number for (_, specs), number in files for spec in specs}
    whole = pools_of(layout.plan)
    found: dict[int, Share] = {}
    for number in range(1, of + 1):
        own = [replace(pool, jobs=tuple(job for job in pool.jobs if owner[job.name] == number)) for pool in whole]
        if any(pool.jobs for pool in own):
            found[number] = Share(tuple(own))
    return found


def shared_counts(opened: Opened, notes: CountNotes, walk: Walk, on_progress: OnProgress) -> SharedCounts:
    """For the part that keeps these notes."""
    shares, here = shares_of(opened.layout, notes.part.of), counting(opened.setting, walk)
    return SharedCounts(notes, shares, len(opened.setting.labels), here, on_progress)


@dataclass
class SharedCounts:
    """Counts the shares of one part and what others leave, by `count`, and takes the others' counts from the notes."""

    notes: CountNotes
    shares: Mapping[int, Share]
    experts: int
    count: Count
    on_progress: OnProgress
    _seconds: float = 0.0
    _nbytes: int = 0

    def __call__(self, pools: Sequence[Pool], halves: Halves | None) -> Counts:
        bins = UPPER if halves is None else LOWER
        totals = {pool.number: torch.zeros(self.experts, bins, dtype=torch.int64) for pool in pools}
        one = _OnePass(self.notes, self.shares, totals, halves, self._patience)
        delay = _POLLED[0]
        while one.find():
            share = one.to_count()
            if share is None:
                self._tell(one.missing)
                time.sleep(delay)
                delay = min(2 * delay, _POLLED[1])
            else:
                one.add(share, self._counted(share, halves))
                delay = _POLLED[0]
        return totals

    def _counted(self, number: int, halves: Halves | None) -> Counts:
        share, began = self.shares[number], time.monotonic()
        counts = self.count(share.pools, halves)
        self._seconds += time.monotonic() - began
        self._nbytes += share.nbytes
        return counts

    def _patience(self, number: int) -> float:
        """How long another may take for a share."""
        pace = (_SLOW * _KNOWN + self._seconds) / (_KNOWN + self._nbytes)
        return _PATIENCE + _TIMES * pace * self.shares[number].nbytes

    def _tell(self, missing: set[int]) -> None:
        done, of = len(self.shares) - len(missing), len(self.shares)
        name = f"waiting for the counts of part {min(missing)}/{self.notes.part.of}"
        self.on_progress(Progress("thresholds", name, done, of, 0, 0, share=done / of, unit="parts"))


@dataclass
class _OnePass:
    """One of the two passes as a part sees it: the sums so far, the shares that are missing, what others have begun."""

    notes: CountNotes
    shares: Mapping[int, Share]
    totals: Counts
    halves: Halves | None
    patience: Callable[[int], float]
    missing: set[int] = field(init=False)
    _there: set[Noted] = field(default_factory=set)
    _unfit: set[Noted] = field(default_factory=set)
    _seen: dict[Noted, float] = field(default_factory=dict)  # when that was first, of what others have begun

    def __post_init__(self) -> None:
        self.missing = set(self.shares)

    @property
    def _which(self) -> Pass:
        return "upper" if self.halves is None else "lower"

    @property
    def _about(self) -> object:
        """What counts depend on beside the run."""
        return None if self.halves is None else sorted((number, list(own)) for number, own in self.halves.items())

    def find(self) -> set[int]:
        """Look at the notes and take the counts of shares that are missing; those that still are."""
        self._look()
        shapes = [(len(total), total.shape[1]) for total in self.totals.values()]
        for note in sorted(note for note in self._there - self._unfit if not note.begun):
            if note.share in self.missing:
                counts = self.notes.read(self._which, note, self._about, shapes)
                if counts is None or not self._fit(note.share, counts):
                    self._unfit.add(note)
                else:
                    self._take(note.share, counts)
        return self.missing

    def _look(self) -> None:
        found, now = self.notes.look(self._which), time.monotonic()
        self._there = {note for note in found if note.share in self.shares}
        for note in self._there:
            self._seen.setdefault(note, now)

    def _fit(self, number: int, counts: Sequence[torch.Tensor]) -> bool:
        """Whether there are no more than the share has entries: no sum overflows, whoever wrote the file."""
        most = [sum(job.spec.count for job in pool.jobs) for pool in self.shares[number].pools]
        return all(int(own.max()) <= n and int(own.sum(1).max()) <= n for own, n in zip(counts, most, strict=True))

    def _take(self, share: int, counts: Sequence[torch.Tensor]) -> None:
        for total, more in zip(self.totals.values(), counts, strict=True):
            total += more
        self.missing.remove(share)

    def add(self, share: int, counts: Counts) -> None:
        """What was counted here."""
        own = [counts[number] for number in self.totals]
        self.notes.note(self._which, share, self._about, own)
        self._take(share, own)

    def to_count(self) -> int | None:
        """The share to count next, of which others are told; None where there is nothing to do but to look again.

        The own one comes first; of the rest, parts take different ones. Where two have begun the same at once, the part
        with the lower number goes on.
        """
        own = self.notes.part.number
        free = sorted(self.missing - {note.share for note in self._at_work()})
        if not free:
            return None
        chosen = own if own in free else free[-1 - own % len(free)]  # from the end: low numbers begin first
        self.notes.begin(self._which, chosen)
        self._look()
        done = any(note.share == chosen and not note.begun for note in self._there - self._unfit)
        first = min((note.by for note in self._at_work() if note.share == chosen), default=own)
        return None if done or first < own else chosen

    def _at_work(self) -> set[Noted]:
        """What others have begun not too long ago and have not noted yet."""
        now, own = time.monotonic(), self.notes.part.number
        done = {(note.share, note.by) for note in self._there if not note.begun}
        return {
            note
            for note in self._there
            if note.begun
            and note.by != own
            and (note.share, note.by) not in done
            and now - self._seen[note] < self.patience(note.share)
        }
