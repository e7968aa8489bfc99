"""The SHA-256 of what is read of the inputs: of every tensor as its file has it, from the very bytes that are used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from acemerge.checkpoints import files
from acemerge.checkpoints.address import HUB, scheme_of
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import TensorInfo
from acemerge.errors import CheckpointError

# So many bytes are read before they are hashed, where nothing is lost by it: a core's own cache still has them.
IN_CACHE = 512 << 10
_BLOCK = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHANGED = "let nobody write to the inputs and run again"


@dataclass(frozen=True, slots=True)
class Hashed:
    """The first `nbytes` of the `of` bytes that a file has from `offset` on, by their SHA-256."""

    offset: int
    of: int
    nbytes: int
    sha256: str

    @property
    def whole(self) -> bool:
        return self.nbytes == self.of

    def holds(self, path: Path) -> bool:
        """Whether the file has these bytes there now."""
        return sha256_of(path, self.offset, self.nbytes) == self.sha256


@dataclass(frozen=True)
class FileRead:
    """What was read of a file, by the names of its tensors.

    `in_order` says that each byte was read once. What was read again was not hashed again: that it was the same is only
    known of a file that nobody has written to since it was opened.
    """

    tensors: Mapping[str, Hashed]
    in_order: bool = True


# Of every file what was read of it, by its path; None where it is not known what was used. The whole of a file that
# others read has no name.
Read = Mapping[str, Mapping[str, Hashed] | None]
WHOLE_FILE = ""


@dataclass(slots=True)
class TensorHash:
    """The SHA-256 of a stored tensor, from its bytes as they are read for another purpose.

    Bytes are hashed in the order of the file. What was passed over is read for the hash alone, and what comes again was
    hashed before. There is one for every tensor of a model, so it keeps no digest when it has the hash.
    """

    info: TensorInfo
    _descriptor: Callable[[Path], files.Handle] = field(repr=False)
    _lock: Lock = field(repr=False)  # others may have it, too
    in_order: bool = True
    _position: int = 0
    _digest: hashlib._Hash | Hashed = field(default_factory=hashlib.sha256, repr=False)

    def feed(self, offset: int, view: memoryview) -> None:
        """Bytes that were read from `offset` of the file on."""
        at = offset - self.info.offset
        if at < self._position:
            self.in_order = False
            return
        self._read_up_to(at)
        self._add(view)

    def finish(self) -> None:
        self._read_up_to(self.info.spec.nbytes)

    def so_far(self) -> Hashed:
        """What is known of it, while more is read."""
        with self._lock:
            return self._hashed(self._digest)

    def _hashed(self, digest: hashlib._Hash | Hashed) -> Hashed:
        if isinstance(digest, Hashed):
            return digest
        return Hashed(self.info.offset, self.info.spec.nbytes, self._position, digest.copy().hexdigest())

    def _add(self, view: memoryview) -> None:
        with self._lock:
            if isinstance(self._digest, Hashed):
                return
            self._digest.update(view)
            self._position += len(view)
            if self._position == self.info.spec.nbytes:
                self._digest = self._hashed(self._digest)

    def _read_up_to(self, end: int) -> None:
        block = bytearray(min(_BLOCK, max(0, end - self._position)))
        while self._position < end:
            part = memoryview(block)[: end - self._position]
            file = self.info.file
            files.read_into(self._descriptor(file), [part], self.info.offset + self._position, file)
            self._add(part)


def sha256_of(path: Path, offset: int, nbytes: int) -> str:
    """Of a range of a file."""
    digest, end = hashlib.sha256(), offset + nbytes
    descriptor = files.open_for_reading(path)
    try:
        for start in range(offset, end, _BLOCK):
            block = memoryview(bytearray(min(_BLOCK, end - start)))
            files.read_into(descriptor, [block], start, path)
            digest.update(block)
    finally:
        files.close(descriptor)
    return digest.hexdigest()


def tensor_hashes(reads: Iterable[Read]) -> dict[Path, dict[str, str]]:
    """For every file the SHA-256 of each tensor that was read of it, whole.

    CheckpointError where one was not the same each time.
    """
    found: dict[Path, dict[str, str]] = {}
    for path, tensors in ((Path(path), tensors) for read in reads for path, tensors in read.items() if tensors):
        known = found.setdefault(path, {})
        for name, part in tensors.items():
            if name == WHOLE_FILE:
                continue
            whole = part.sha256 if part.whole else sha256_of(path, part.offset, part.of)
            if known.setdefault(name, whole) != whole:
                raise CheckpointError(path, f"changed during the run, in tensor {name!r}", _CHANGED)
    return found


def files_read(found: Mapping[Path, FileRead]) -> dict[str, Mapping[str, Hashed]]:
    return {str(path): read.tensors for path, read in found.items()}


def known_sha256(path: Path) -> str | None:
    """What the Hub says of a large file of its own: its cache has the file under that name."""
    if scheme_of(path) == HUB:
        told = str(files.fingerprint(path)[1])
    else:
        told = path.name if path.parent.name == "blobs" else ""
    return told if _SHA256.fullmatch(told) else None


def check_unchanged(checkpoint: Checkpoint, read: Mapping[Path, FileRead]) -> None:
    """CheckpointError when a weight file was written since it was opened.

    Size and times tell. Where only a time differs, the file may have been touched, copied or linked: what was read of
    it is read again and compared, if that was hashed. Of an object its ETag says as much.
    """
    for path, before in checkpoint.fingerprints.items():
        now = files.fingerprint(path)
        if now != before and not (now[0] == before[0] and _has_the_same(path, read.get(path))):
            raise CheckpointError(path, "changed during the run", _CHANGED)


def _has_the_same(path: Path, read: FileRead | None) -> bool:
    if read is None or scheme_of(path):
        return False
    return read.in_order and all(part.holds(path) for part in read.tensors.values())


def longer(one: Mapping[str, Hashed] | None, other: Mapping[str, Hashed] | None) -> dict[str, Hashed] | None:
    """What is known of a file by both together; None where either is, or where they do not agree."""
    if one is None or other is None:
        return None
    found = dict(one)
    for name, part in other.items():
        known = found.get(name, part)
        if known.nbytes == part.nbytes and known != part:
            return None
        found[name] = max(known, part, key=lambda p: p.nbytes)
    return found


def whole_files(models: Sequence[Checkpoint]) -> dict[str, dict[str, Hashed] | None]:
    """The hash of every weight file as a whole; None of one that was written to since it was opened."""
    found: dict[str, dict[str, Hashed] | None] = {}
    for path, before in (each for model in models for each in model.fingerprints.items()):
        size = before[0]
        total = {WHOLE_FILE: Hashed(0, size, size, files.sha256(path))}
        found[str(path)] = total if files.fingerprint(path) == before else None
    return found
