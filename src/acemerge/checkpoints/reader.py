"""Reading a checkpoint's tensors in bulk, and hashing the very bytes that were read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Lock

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.float8 import dequantised
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import FLOAT8, TensorInfo
from acemerge.errors import CheckpointError
from acemerge.shapes import Tensor

# Tensors begin at a multiple of this in a buffer, whatever their place in the file.
_ALIGNMENT = 64
_GAP_BLOCK = 1 << 22


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
    """One checkpoint, read in one thread. With `hashing`, every file's SHA-256 is taken from what was read.

    Bytes are hashed in the order of the file. What was passed over is read for the hash alone, and what comes
    out of order was hashed before, so that a file's hash is complete whatever was asked for. Without `cached`, the
    system need not keep what was read.
    """

    checkpoint: Checkpoint
    hashing: bool = False
    cached: bool = True
    _hashes: dict[Path, FileHash] = field(default_factory=dict)
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
            pieces = tuple(_pieces(parts, at))
            found.append(_FoundSpan(info.file, offset, nbytes, at, info.spec.dtype, shape, scaling, pieces))
            at = end_of if scaling is None else end_of + _aligned(scaling.place.nbytes)
        return FoundSpans(found, at)

    def _scaling(self, span: Span, at: int) -> _Scaling | None:
        """The span's scale, whole: it is small."""
        scale = self.checkpoint.scales.get(span.name)
        if scale is None:
            return None
        file, offset, spec = scale.info.file, scale.info.offset, scale.info.spec
        place = _FoundSpan(file, offset, spec.nbytes, at, spec.dtype, scale.shape)
        return _Scaling(place, scale.repeats, span.rows[0] if span.rows else 0)

    def read(self, places: FoundSpans, buffer: Tensor) -> list[Stored]:
        """The tensors at `places`, within `buffer` (uint8)."""
        space: memoryview = buffer.numpy().data
        for file, together in groupby(_runs(places.found), key=lambda run: run[0].file):
            runs = [(run[0].offset, [space[p.at : p.at + p.nbytes] for p in run]) for run in together]
            files.read_runs(self._descriptor(file), runs, file)
            for offset, views in runs:
                if not self.cached:
                    files.forget(self._descriptor(file), offset, sum(map(len, views)))
                if self.hashing:
                    self._hash(file).feed(offset, views)

        def within(place: _FoundSpan) -> Tensor:
            return buffer[place.at : place.at + place.nbytes].view(place.dtype).view(place.shape)

        return [
            Stored(within(p), within(p.scaling.place), p.scaling.repeats, p.scaling.first)
            if p.scaling
            else Stored(within(p))
            for p in places.found
        ]

    def hashes(self) -> dict[Path, FileHash]:
        """The hashes of all files, complete."""
        for file in self.checkpoint.weight_files:
            self._hash(file).finish()
        return self._hashes

    def so_far(self) -> dict[Path, FileHash]:
        """The hashes of what was read until now, while more is read."""
        return dict(self._hashes)

    def close(self) -> None:
        if self._open is not None:
            files.close(self._open[1])
            self._open = None

    def _descriptor(self, file: Path) -> files.Handle:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, files.open_for_reading(file)
        return self._open[1]

    def _hash(self, file: Path) -> FileHash:
        if file not in self._hashes:
            size, *_ = self.checkpoint.fingerprints[file]
            self._hashes[file] = FileHash(file, size, self._descriptor)
        return self._hashes[file]


def _pieces(parts: Sequence[TensorInfo], at: int) -> Iterator[_FoundSpan]:
    """The parts of one tensor, one behind the other in the buffer from `at`."""
    for part in parts:
        yield _FoundSpan(part.file, part.offset, part.spec.nbytes, at, part.spec.dtype, part.spec.shape)
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


@dataclass
class FileHash:
    """The SHA-256 of a file, from bytes that are read for another purpose.

    `in_order` says that all bytes came in the order of the file or were passed over for good: then the hash is
    of the very bytes that were used.
    """

    file: Path
    nbytes: int
    _descriptor: Callable[[Path], files.Handle] = field(repr=False)
    position: int = 0
    in_order: bool = True
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def first_bytes(self) -> tuple[str, int]:
        """Hash and number of the bytes until now. Of those that were read again, the first time counts."""
        with self._lock:
            return self._digest.copy().hexdigest(), self.position

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def feed(self, offset: int, views: Sequence[memoryview]) -> None:
        """Bytes that were read from `offset` on."""
        if offset < self.position:
            self.in_order = False
            return
        self._read_up_to(offset)
        for view in views:
            self._add(view)

    def _add(self, view: memoryview) -> None:
        with self._lock:
            self._digest.update(view)
            self.position += len(view)

    def finish(self) -> None:
        self._read_up_to(self.nbytes)

    def _read_up_to(self, end: int) -> None:
        block = bytearray(min(_GAP_BLOCK, end - self.position))
        while self.position < end:
            part = memoryview(block)[: end - self.position]
            files.read_into(self._descriptor(self.file), [part], self.position, self.file)
            self._add(part)


def check_unchanged(checkpoint: Checkpoint, hashes: dict[Path, FileHash]) -> None:
    """CheckpointError when a weight file was written since it was opened.

    Size and times tell. Where only a time differs, the file may have been touched, copied or linked: it is hashed
    again and compared with what was read, if that was hashed. Of an object its ETag says as much.
    """
    for path, before in checkpoint.fingerprints.items():
        now = files.fingerprint(path)
        if now == before:
            continue
        read = hashes.get(path)
        same = (
            read and not scheme_of(path) and now[0] == before[0] and read.in_order and files.sha256(path) == read.sha256
        )
        if not same:
            raise CheckpointError(path, "changed during the run", "let nobody write to the inputs and run again")
