"""What a run needs of where it writes to: what a folder and a store have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from acemerge.output.journal import Done, Journal, Step
from acemerge.output.writer import FileSum
from acemerge.planning.parts import Part


class Output(Protocol):
    """Where a run writes to: a folder, or a store. Files are written at `path` first, under their partial names.

    `begun` says that there are files of it, `kept` that they stay whatever fails: all weights are computed.
    A `part` of a run is run again as it was, all of one with --resume.
    """

    path: Path
    written: dict[str, FileSum]
    begun: bool
    kept: bool
    part: Part | None

    @property
    def home(self) -> Path:
        """The folder, or the address, that the output has when it is published."""
        ...

    @property
    def work(self) -> Path:
        """A folder for what the run needs on disk while it lasts; made by whoever needs it."""
        ...

    def left(self, names: Collection[str]) -> Done | None:
        """What an interrupted run has done of the files of these names."""
        ...

    def left_by(self, part: Part, names: Collection[str]) -> Done | None:
        """The same of a part of the run, whose files are to be published."""
        ...

    def unfinished(self, name: str) -> Path:
        """Where a file lies that a part has written."""
        ...

    def begin(self, done: Done) -> Journal:
        """Begin to write, in the place of what an interrupted run left but for what of it is done."""
        ...

    def complete(self, steps: Sequence[Step], finished: Mapping[str, FileSum]) -> None:
        """These steps are done, and all of these files are there."""
        ...

    def keep(self) -> None:
        """All files of a part are there: see that they stay."""
        ...

    def write_bytes(self, name: str, data: bytes) -> None: ...

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file beside the weights."""
        ...

    def publish(self, manifest: bytes) -> None:
        """Make everything visible, the manifest last."""
        ...

    def discard(self) -> None:
        """Remove what was written and not published."""
        ...
