"""The zip file that `torch.save` writes: where each record's bytes lie, checked before any of them is used.

The central directory is only a claim. A record is taken when its own header agrees, it is stored as it is, and
its bytes lie inside the file apart from all others.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from acemerge.checkpoints import files
from acemerge.checkpoints.header import MAX_TENSORS
from acemerge.checkpoints.pointers import LENGTH, check_fetched
from acemerge.errors import CheckpointError, fetching

MAX_DIRECTORY = 16 << 20
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_OLDER = b"\x80"  # a bare pickle begins so
_ENCRYPTED, _UTF8 = 0x1, 0x800
_CURE = "load it where you trust it and save it again with save_pretrained, which writes safetensors"
DAMAGED = fetching(f"it again, or {_CURE}")
# All that a state dict saved by torch.save consists of.
_RECORD = re.compile(
    r"data\.pkl|data/[0-9]+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)


@dataclass(frozen=True)
class Record:
    """One stored record: `nbytes` from `offset` in the file."""

    offset: int
    nbytes: int


def read_records(descriptor: files.Handle, path: Path) -> Mapping[str, Record]:
    """The records of an archive by their names without the common first folder."""
    size = files.fingerprint(path)[0]
    beginning = read_at(descriptor, 0, min(size, LENGTH), path)
    check_fetched(beginning, path)
    if not beginning.startswith(_LOCAL):
        what = "is no zip file of torch.save: an older pickle, a tar file, or something else"
        raise CheckpointError(path, what, _CURE if beginning.startswith(_OLDER) else DAMAGED)
    entries, end = _directory(_Window(descriptor, size, path))
    records: dict[str, Record] = {}
    extents: list[tuple[int, int, str]] = []
    for entry in entries:
        name = _checked_name(entry, path)
        if name in records:
            raise CheckpointError(path, f"the record {name[:80]!r} stands twice", DAMAGED)
        records[name] = _located(descriptor, entry, size, path)
        extents.append((entry.header_offset, records[name].offset + records[name].nbytes, name))
    if len({entry.orig_filename.split("/")[0] for entry in entries}) > 1:
        raise CheckpointError(path, "its records are not all in one folder", _CURE)
    _check_apart(sorted(extents), end, path)
    return records


def read_at(descriptor: files.Handle, offset: int, count: int, path: Path) -> bytes:
    """`count` bytes from `offset`, all of them or an error."""
    block = bytearray(count)
    files.read_into(descriptor, [memoryview(block)], offset, path)
    return bytes(block)


def _directory(window: _Window) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of the central directory and where it begins."""
    try:
        with zipfile.ZipFile(cast(IO[bytes], window)) as archive:
            return archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except Exception as failure:  # a hostile directory makes zipfile raise errors of many kinds
        what = f"its zip directory is damaged ({(str(failure) or type(failure).__name__)[:80]})"
        raise CheckpointError(window.path, what, fetching("the file again")) from None


class _Window:
    """The file as zipfile asks for it: read by pread, and never more than a directory may have."""

    def __init__(self, descriptor: files.Handle, size: int, path: Path) -> None:
        self.descriptor, self.size, self.path, self.position = descriptor, size, path, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, self.size)[whence]
        if position < 0:
            raise OSError("seek before the start of the file")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        rest = max(self.size - self.position, 0)
        count = rest if count < 0 else min(count, rest)
        if count > MAX_DIRECTORY:
            what = f"a zip directory of {count:,} bytes is over the limit of {MAX_DIRECTORY:,}"
            raise CheckpointError(self.path, what, _CURE)
        block = read_at(self.descriptor, self.position, count, self.path)
        if block.count(_ENTRY) > MAX_TENSORS + 16:
            what = f"more than the {MAX_TENSORS:,} records that a shard may hold"
            raise CheckpointError(self.path, what, "save it in more shards")
        self.position += count
        return block


def _checked_name(entry: zipfile.ZipInfo, path: Path) -> str:
    """The record's name in its archive; CheckpointError for what a state dict has no use for."""
    _, slash, name = entry.orig_filename.partition("/")
    shown = entry.orig_filename[:80]
    if name.startswith("code/") or name == "constants.pkl":
        raise CheckpointError(path, "is a TorchScript archive, which is a program", _CURE)
    if not slash or entry.orig_filename.split("/")[0] in ("", "..") or _RECORD.fullmatch(name) is None:
        raise CheckpointError(path, f"the record {shown!r} is no part of a state dict", _CURE)
    if entry.flag_bits & _ENCRYPTED:
        raise CheckpointError(path, f"the record {shown!r} is encrypted", _CURE)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(path, f"the record {shown!r} is compressed", _CURE)
    return name


def _located(descriptor: files.Handle, entry: zipfile.ZipInfo, size: int, path: Path) -> Record:
    """Where a record's bytes begin, by its own header, which must agree with the directory."""
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    length = 30 + len(name)
    if not 0 <= entry.header_offset <= size - length:
        raise CheckpointError(path, f"the record {entry.orig_filename[:80]!r} lies outside the file", DAMAGED)
    header = read_at(descriptor, entry.header_offset, length, path)
    signature, _, flags, method, _, _, _, _, _, name_size, extra_size = struct.unpack("<4s5H3I2H", header[:30])
    agrees = signature == _LOCAL and method == zipfile.ZIP_STORED and not flags & _ENCRYPTED
    if not agrees or name_size != len(name) or header[30:] != name:
        what = f"the record {entry.orig_filename[:80]!r} is not what the zip directory says"
        raise CheckpointError(path, what, DAMAGED)
    return Record(entry.header_offset + length + extra_size, entry.file_size)


def _check_apart(extents: list[tuple[int, int, str]], end: int, path: Path) -> None:
    """CheckpointError unless the records follow one another from the first byte up to the directory."""
    if not extents or extents[0][0] != 0:
        raise CheckpointError(path, "does not begin with its first record", DAMAGED)
    position = 0
    for start, stop, name in extents:
        if start < position:
            raise CheckpointError(path, f"the record {name[:80]!r} overlaps the one before it", DAMAGED)
        position = stop
    if position > end:
        raise CheckpointError(path, "its records reach beyond its data", fetching("the file again: it is truncated"))
