"""Reading a checkpoint's tensors in bulk, and hashing the very bytes that were read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from threading import Lock

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.float8 import dequantised
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.hashes import IN_CACHE, FileRead, Hashed, TensorHash
from acemerge.checkpoints.header import FLOAT8, TensorInfo
from acemerge.shapes import Tensor

# Tensors begin at a multiple of this in a buffer, whatever their place in the file.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Span:
    """A tensor, or a range of its rows."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class _FoundSpan:
    """Where a span lies in its file, and where in the buffer; `parts` where it lies in several places of its files."""

    file: Path
    offset: int
    nbytes: int
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: TensorInfo
    scaling: _Scaling | None = None
    parts: tuple[_FoundSpan, ...] = ()

    @property
    def to_read(self) -> tuple[_FoundSpan, ...]:
        return self.parts or ((self, self.scaling.place) if self.scaling else (self,))


@dataclass(frozen=True)
class _Scaling:
    """The scale of an fp8 span, whose first row is `first` of the tensor."""

    place: _FoundSpan
    repeats: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Stored:
    """A tensor as it was read, in memory of the buffer."""

    values: Tensor
    scale: Tensor | None = None
    repeats: tuple[int, ...] = ()
    first: int = 0

    def tensor(self) -> Tensor:
        """The values, those in fp8 as the float32 that they stand for, in memory of their own."""
        if self.values.dtype in FLOAT8.values():
            return dequantised(self.values, self.scale, self.repeats, self.first)
        return self.values


@dataclass(frozen=True)
class FoundSpans:
    """Spans found, and the bytes of the buffer that holds them."""

    found: Sequence[_FoundSpan]
    nbytes: int


@dataclass
class Reader:
    """One checkpoint, read in one thread. With `hashing`, every tensor's SHA-256 is taken from what was read.

    Without `cached`, the system need not keep what was read.
    """

    checkpoint: Checkpoint
    hashing: bool = False
    cached: bool = True
    _hashes: dict[Path, dict[str, TensorHash]] = field(default_factory=dict)
    _news: dict[Path, dict[str, TensorHash]] = field(default_factory=dict)
    _again: set[Path] = field(default_factory=set)  # some of these was read more than once
    _lock: Lock = field(default_factory=Lock, repr=False)
    _open: tuple[Path, files.Handle] | None = None

    def places(self, spans: Sequence[Span]) -> FoundSpans:
        """Where the spans lie in the files, and where in a buffer for all of them."""
        found, at = [], 0
        for span in spans:
            info = self.checkpoint.places[span.name]
            offset, shape, nbytes, parts = info.offset, info.spec.shape, info.spec.nbytes, info.parts
            if span.rows is not None:
                first, end = span.rows
                row = nbytes // shape[0]
                each = len(parts) // shape[0]
                parts = parts[first * each : end * each]
                offset, shape, nbytes = offset + first * row, (end - first, *shape[1:]), (end - first) * row
            end_of = at + _aligned(nbytes)
            scaling = self._scaling(span, end_of)
            whole = info.stored
            pieces = tuple(_pieces(parts, at))
            found.append(_FoundSpan(info.file, offset, nbytes, at, info.spec.dtype, shape, whole, scaling, pieces))
            at = end_of if scaling is None else end_of + _aligned(scaling.place.nbytes)
        return FoundSpans(found, at)

    def _scaling(self, span: Span, at: int) -> _Scaling | None:
        """The span's scale, whole: it is small."""
        scale = self.checkpoint.scales.get(span.name)
        if scale is None:
            return None
        file, offset, spec = scale.info.file, scale.info.offset, scale.info.spec
        place = _FoundSpan(file, offset, spec.nbytes, at, spec.dtype, scale.shape, scale.info.stored)
        return _Scaling(place, scale.repeats, span.rows[0] if span.rows else 0)

    def read(self, places: FoundSpans, buffer: Tensor) -> list[Stored]:
        """The tensors at `places`, within `buffer` (uint8)."""
        space: memoryview = buffer.numpy().data
        for file, together in groupby(_runs(places.found), key=lambda run: run[0].file):
            runs = list(together)
            # Of an object as much as may be is asked for at once.
            in_parts = self.hashing and not scheme_of(file)
            for some in [[part] for run in runs for part in _parts(run)] if in_parts else [runs]:
                self._read(file, some, space)
            for run in runs if not self.cached else ():
                files.forget(self._descriptor(file), run[0].offset, sum(place.nbytes for place in run))

        def within(place: _FoundSpan) -> Tensor:
            return buffer[place.at : place.at + place.nbytes].view(place.dtype).view(place.shape)

        return [
            Stored(within(p), within(p.scaling.place), p.scaling.repeats, p.scaling.first)
            if p.scaling
            else Stored(within(p))
            for p in places.found
        ]

    def _read(self, file: Path, runs: Sequence[Sequence[_FoundSpan]], space: memoryview) -> None:
        """Runs of one file, and their hashes."""
        views = [[space[place.at : place.at + place.nbytes] for place in run] for run in runs]
        found = [(run[0].offset, own) for run, own in zip(runs, views, strict=True)]
        files.read_runs(self._descriptor(file), found, file)
        if self.hashing:
            for run, own in zip(runs, views, strict=True):
                self._hash(run, own)

    def hashes(self) -> dict[Path, FileRead]:
        """All that was read, with each tensor's hash complete."""
        for found in self._hashes.values():
            for tensor in found.values():
                tensor.finish()
        return {
            path: FileRead({name: tensor.so_far() for name, tensor in found.items()}, path not in self._again)
            for path, found in self._hashes.items()
        }

    def news(self) -> dict[Path, dict[str, Hashed] | None]:
        """What was read since it was asked for last, while more is read. None for a file of which something was read
        again after somebody wrote to it: it is not known what was used.
        """
        with self._lock:
            news, self._news = self._news, {}
        return {
            path: {name: tensor.so_far() for name, tensor in found.items()} if self._is_known(path) else None
            for path, found in news.items()
        }

    def _is_known(self, path: Path) -> bool:
        """An object is asked for as the one that it was."""
        if path not in self._again or scheme_of(path):
            return True
        return files.fingerprint(path) == self.checkpoint.fingerprints[path]

    def close(self) -> None:
        if self._open is not None:
            files.close(self._open[1])
            self._open = None

    def _descriptor(self, file: Path) -> files.Handle:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, files.open_for_reading(file)
        return self._open[1]

    def _hash(self, run: Sequence[_FoundSpan], views: Sequence[memoryview]) -> None:
        for span, view in zip(run, views, strict=True):
            file, name = span.file, span.stored.spec.name
            found = self._hashes.setdefault(file, {})
            if name not in found:
                found[name] = TensorHash(span.stored, self._descriptor, self._lock)
            found[name].feed(span.offset, view)
            if not found[name].in_order:
                self._again.add(file)
            with self._lock:
                self._news.setdefault(file, {})[name] = found[name]


def _pieces(parts: Sequence[TensorInfo], at: int) -> Iterator[_FoundSpan]:
    """The parts of one tensor, one behind the other in the buffer from `at`."""
    for part in parts:
        spec = part.spec
        yield _FoundSpan(part.file, part.offset, spec.nbytes, at, spec.dtype, spec.shape, part.stored)
        at += part.spec.nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _runs(found: Sequence[_FoundSpan]) -> Iterator[list[_FoundSpan]]:
    """Spans that follow each other in one file, to be read at once."""
    run: list[_FoundSpan] = []
    for place in (each for p in found for each in p.to_read):
        if place.nbytes == 0:
            continue
        follows = run and run[-1].file == place.file and run[-1].offset + run[-1].nbytes == place.offset
        if run and not follows:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _parts(run: Sequence[_FoundSpan]) -> Iterator[list[_FoundSpan]]:
    """A run in parts of up to `IN_CACHE` bytes, which may end within a tensor."""
    part: list[_FoundSpan] = []
    room = IN_CACHE
    for place in run:
        done = 0
        while done < place.nbytes:
            nbytes = min(room, place.nbytes - done)
            part.append(replace(place, offset=place.offset + done, at=place.at + done, nbytes=nbytes))
            done, room = done + nbytes, room - nbytes
            if room == 0:
                yield part
                part, room = [], IN_CACHE
    if part:
        yield part
