"""What the parts of a run note for each other of their counts of the whole model, until it is finished.

They lie in one folder, so that one look tells what there is. A name says what was counted, of which run, and who has;
so a part removes its own alone, and two never write one file. What is read is checked as if a stranger had written it:
what is torn, altered, or not of this very run and pass is no count.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.unfinished import SHARDS
from acemerge.errors import CheckpointError
from acemerge.output.folder import to_write
from acemerge.output.writer import PARTIAL, write_file
from acemerge.planning.parts import Part
from acemerge.shapes import Int, Tensor

Pass = Literal["upper", "lower"]  # of the halves of bits that are counted
COUNTS = f"{SHARDS}/counts"
_NUMBER = "[1-9][0-9]{0,5}"
_RUN = 16  # digits of a run's digest in a name
_NAME = re.compile(
    rf"(?P<run>[0-9a-f]{{{_RUN}}})-(?P<which>upper|lower)-(?P<share>{_NUMBER})-by-(?P<by>{_NUMBER})-of-(?P<of>{_NUMBER})"
    rf"(?P<begun>\.begun)?(?P<partial>{re.escape(PARTIAL)})?",
    re.ASCII,
)
_SLACK = 4096  # bytes that what does not get smaller may be longer


@dataclass(frozen=True, order=True)
class Noted:
    """A note: which part's share it is of, and which part has counted it, or has only begun to."""

    share: int
    by: int
    begun: bool


@dataclass(frozen=True)
class CountNotes:
    """The notes of one run, by the digest of what it is, for one of its parts."""

    home: Path
    part: Part
    run: str

    def look(self, which: Pass) -> set[Noted]:
        """What there is of a pass."""
        wanted = (self.run[:_RUN], which, str(self.part.of), None)
        return {_noted(name) for name in _names(self.home) if name.group("run", "which", "of", "partial") == wanted}

    def begin(self, which: Pass, share: int) -> None:
        """Say that this part counts a share, so that others do not."""
        write_file(self._path(which, Noted(share, self.part.number, True)), b"begun\n")

    def note(self, which: Pass, share: int, about: Any, counts: Sequence[Int[Tensor, "T bins"]]) -> None:
        """Note a share's counts; `about` says with them what they are of."""
        data = b"".join(part.numpy().astype("<i8").tobytes() for part in counts)
        content = zlib.compress(data, 1)
        check = self._check(which, share, about, content)
        write_file(self._path(which, Noted(share, self.part.number, False)), check + b"\n" + content)

    def read(
        self, which: Pass, note: Noted, about: Any, shapes: Sequence[tuple[int, int]]
    ) -> list[Int[Tensor, "T bins"]] | None:
        """Counts of these shapes, none of them negative; None where the note does not hold such of just that."""
        length = 8 * sum(map(math.prod, shapes))
        try:
            data = files.read_small(self._path(which, note), length + length // 64 + _SLACK)
        except CheckpointError:  # removed since, or no file
            return None
        check, _, content = data.partition(b"\n")
        if check != self._check(which, note.share, about, content):
            return None
        values = _unpacked(content, length)
        if values is None or (values < 0).any():
            return None
        parts = values.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _path(self, which: Pass, note: Noted) -> Path:
        name = f"{self.run[:_RUN]}-{which}-{note.share}-by-{note.by}-of-{self.part.of}"
        return self.home / COUNTS / (name + ".begun" * note.begun)

    def _check(self, which: Pass, share: int, about: Any, content: bytes) -> bytes:
        head = json.dumps([self.run, which, share, self.part.of, about], sort_keys=True).encode()
        return hashlib.sha256(head + b"\n" + content).hexdigest().encode()


def forget_counts(home: Path, part: Part | None = None) -> None:
    """Remove what a part has noted of counts at `home`, of whatever run; or what all have."""
    for name in _names(home):
        if part is None or (int(name["by"]), int(name["of"])) == (part.number, part.of):
            files.remove(home / COUNTS / name[0])
    files.remove_folder(home / COUNTS)


def _names(home: Path) -> Iterator[re.Match[str]]:
    """The names of all notes, those that are being written among them."""
    folder = home / COUNTS
    with to_write():
        there = scheme_of(folder) or files.kind(folder) == "folder"
        names = files.list_folder(folder) if there else []
    return filter(None, map(_NAME.fullmatch, names))


def _noted(name: re.Match[str]) -> Noted:
    return Noted(int(name["share"]), int(name["by"]), name["begun"] is not None)


def _unpacked(content: bytes, length: int) -> Int[Tensor, " n"] | None:
    """Exactly so many bytes as numbers; never more are made of them."""
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(content, length + 1)
    except zlib.error:
        return None
    if len(data) != length or not unpacking.eof:
        return None
    return torch.from_numpy(np.frombuffer(data, "<i8").astype(np.int64))
