"""An output folder in which nothing unfinished ever looks finished.

Every file is written as `NAME.acemerge.partial` and synced. Only when all are there are they renamed into place, the
manifest last: readers take a folder without a manifest for unfinished. A failure before that point leaves an
earlier output as it was; a failure while renaming puts it back. What an interrupted run has written stays beside
its journal, until it is continued or done away with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acemerge.checkpoints import files, locks
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.header import parse_json
from acemerge.checkpoints.unfinished import JOURNAL, MANIFEST, SHARDS
from acemerge.errors import (
    AcemergeError,
    CheckpointError,
    ResourceError,
    UnreachableError,
    UsageError,
    WriteError,
    shortages,
)
from acemerge.output.journal import Done, Journal, Step, read_journal
from acemerge.output.names import LOCK, MAX_MANIFEST, OLD, REPORT, WORK, is_output, side_folders
from acemerge.output.protocol import Output
from acemerge.output.writer import PARTIAL, FileSum, write_partial
from acemerge.planning.parts import Part

# After these a run can be continued: nothing is wrong with what it was asked to do.
RESUMABLE = (KeyboardInterrupt, SystemExit, WriteError, ResourceError, UnreachableError)


@dataclass
class OutputFolder:
    """The files of one run in a folder, until `publish` makes them visible at once; of a `part`, never."""

    path: Path
    written: dict[str, FileSum] = field(default_factory=dict)
    begun: bool = False
    kept: bool = False
    part: Part | None = None

    @property
    def home(self) -> Path:
        return self.path

    def left(self, names: Collection[str]) -> Done | None:
        return read_journal(self.path, names, "" if self.part is None else self.part.folder)

    def left_by(self, part: Part, names: Collection[str]) -> Done | None:
        return read_journal(self.path, names, part.folder)

    def unfinished(self, name: str) -> Path:
        return self.path / (name + PARTIAL)

    def begin(self, done: Done) -> Journal:
        self.begun = True
        return Journal(self.path if self.part is None else self.path / self.part.folder, done)

    def complete(self, steps: Sequence[Step], finished: Mapping[str, FileSum]) -> None:
        """The journal has them; the files wait for the others."""

    def keep(self) -> None:
        """They are synced."""

    @property
    def work(self) -> Path:
        return self.path / WORK

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        self.written[name] = write_partial(self.path / name, chunks)

    def publish(self, manifest: bytes) -> None:
        """Rename everything into place, the manifest last; on failure put an earlier output back."""
        outputs = list(self.written)
        self.write_bytes(MANIFEST, manifest)
        replaced: list[str] = []
        placed: list[str] = []
        try:
            for name in self._obsolete():
                files.rename(self.path / name, self.path / (name + OLD))
                replaced.append(name)
            for name in outputs:
                files.rename(self.path / (name + PARTIAL), self.path / name)
                placed.append(name)
            self._sync()
            files.rename(self.path / (MANIFEST + PARTIAL), self.path / MANIFEST)
            placed.append(MANIFEST)
            self._sync()
        except BaseException:
            self._roll_back(replaced, placed)
            raise
        with contextlib.suppress(AcemergeError):  # the new output is there: what is left of the old does no harm
            self._tidy(replaced)

    def _tidy(self, replaced: Iterable[str]) -> None:
        self._remove_work()
        files.remove(self.path / JOURNAL)
        for name in replaced:
            files.remove(self.path / (name + OLD))
        self._remove_side_folders()

    def _sync(self) -> None:
        for folder in side_folders(self.path):
            files.sync_folder(self.path / folder)
        files.sync_folder(self.path)

    def _remove_side_folders(self) -> None:
        for folder in side_folders(self.path):
            files.remove_folder(self.path / folder)

    def _remove_work(self) -> None:
        remove_files(self.work)
        parts = self.path / SHARDS
        if files.kind(parts) == "folder":
            for name in files.list_folder(parts):
                remove_files(parts / name)
            files.remove_folder(parts)

    def _obsolete(self) -> list[str]:
        """The files of an earlier output that must go or be replaced, its manifest first."""
        there = [name for name in self._listing() if is_output(name) or name in self.written]
        return sorted(there, key=lambda name: name != MANIFEST)

    def _listing(self) -> list[str]:
        """Every file here and in the side folders, by its name in the manifest."""
        names = files.list_folder(self.path)
        for folder in side_folders(self.path):
            names += [f"{folder}/{name}" for name in files.list_folder(self.path / folder)]
        return [name for name in names if files.kind(self.path / name) != "folder"]

    def _roll_back(self, replaced: list[str], placed: list[str]) -> None:
        """Undo as much as can be undone; what cannot is put back by the next run's `recover`."""
        for name in reversed(placed):
            with contextlib.suppress(AcemergeError):
                files.rename(self.path / name, self.path / (name + PARTIAL))
        for name in reversed(replaced):
            with contextlib.suppress(AcemergeError):
                files.rename(self.path / (name + OLD), self.path / name)

    def recover(self) -> None:
        """Tidy up after a run that was killed while publishing.

        With its manifest in place, what is left of the earlier output goes. Before that the earlier output comes
        back, and what was placed is unfinished again.
        """
        listing = self._listing()
        old = [name.removesuffix(OLD) for name in listing if name.endswith(OLD)]
        old = [name for name in old if is_output(name)]
        if MANIFEST in listing:
            for name in old:
                files.remove(self.path / (name + OLD))
            return
        earlier = self._outputs_of(MANIFEST + OLD) if MANIFEST in old else set()
        placing = MANIFEST in old or MANIFEST + PARTIAL in listing
        for name in listing:
            if placing and name != REPORT and is_output(name) and (name in old or name not in earlier):
                files.rename(self.path / name, self.path / (name + PARTIAL))
        for name in sorted(old, key=lambda name: name == MANIFEST):
            files.rename(self.path / (name + OLD), self.path / name)

    def check_own(self) -> None:
        """UsageError where files that are no output of ours would be replaced."""
        listing = self._listing()
        foreign = [] if MANIFEST in listing else sorted(filter(is_output, listing))
        if foreign:
            what = f"holds {foreign[0]}, which no merge has written, as there is no {MANIFEST}"
            raise UsageError(self.path, what, "choose another folder, or move the file away")

    def _outputs_of(self, manifest: str) -> set[str]:
        """The files that a manifest lists."""
        path = self.path / manifest
        cure = "restore the file, or choose another folder"
        content = parse_json(files.read_small(path, MAX_MANIFEST), path, cure)
        outputs = content.get("outputs") if isinstance(content, dict) else None
        return set(outputs) if isinstance(outputs, dict) else set()

    def discard(self) -> None:
        for name in self._listing():
            begun = name.endswith(PARTIAL) and is_output(name.removesuffix(PARTIAL))
            if begun or name in (JOURNAL, JOURNAL + PARTIAL):
                files.remove(self.path / name)
        self._remove_side_folders()
        self._remove_work()


def remove_files(folder: Path) -> None:
    """Remove a folder, if it is one, with the files in it."""
    if files.kind(folder) == "folder":
        for name in files.list_folder(folder):
            files.remove(folder / name)
        files.remove_folder(folder)


def check_output(path: Path, overwrite: bool, resume: bool = False, in_parts: bool = False) -> None:
    """UsageError for what can be no output folder, or holds something that is not to be replaced.

    An unfinished merge is left to `output_folder`: another run may be at it. `in_parts`: what the parts of one run
    have written is no obstacle.
    """
    if scheme_of(path):
        with to_write():
            _check_address(path, overwrite, resume, in_parts)
        return
    there = files.kind(path)
    if there == "link" or side_folders(path, "link"):
        raise UsageError(path, "is a link", "name the folder itself")
    if there not in ("nothing", "folder"):
        raise UsageError(path, f"is a {there}", "name a folder")
    if there == "folder" and JOURNAL not in files.list_folder(path):
        check_contents(path, overwrite, resume, in_parts)


def _check_address(path: Path, overwrite: bool, resume: bool, in_parts: bool) -> None:
    if files.kind(path) == "file":
        raise UsageError(path, "is a file", "name a folder")
    if JOURNAL not in files.list_folder(path):
        check_contents(path, overwrite, resume, in_parts)


@contextlib.contextmanager
def to_write() -> Iterator[None]:
    """A store that does not say what it holds takes nothing either."""
    try:
        yield
    except CheckpointError as failure:
        raise WriteError(failure.where, failure.what, failure.cure) from None


@contextlib.contextmanager
def undone_on_failure(output: Output) -> Iterator[None]:
    """A failure removes what was not published, unless the run can be continued."""
    try:
        with shortages():
            yield
    except RESUMABLE as failure:
        if isinstance(failure, AcemergeError) and output.begun and output.part is None:
            raise failure.resumable from failure
        raise
    except BaseException:
        if output.begun and not output.kept:
            with contextlib.suppress(AcemergeError):
                output.discard()
        raise


@contextlib.contextmanager
def output_folder(path: Path, overwrite: bool, resume: bool = False, in_parts: bool = False) -> Iterator[OutputFolder]:
    """Hold `path` for one run. A failure removes what was not published, unless the run can be continued.

    With `resume`, what an interrupted run left is kept; `in_parts`, what parts have written. Raises UsageError for a
    link or a folder that is not empty (unless `overwrite`, or `resume` for acemerge's own), WriteError where the folder
    cannot be made or another run holds it.
    """
    check_output(path, overwrite, resume, in_parts)
    there = files.kind(path)
    files.make_folder(path)
    try:
        with locks.lock(path / LOCK):
            check_contents(path, overwrite, resume, in_parts)
            output = OutputFolder(path)
            output.recover()
            output.check_own()
            if not (resume or in_parts):
                output.discard()
            with undone_on_failure(output):
                yield output
    finally:
        if there == "nothing":
            files.remove_folder(path)


def check_contents(path: Path, overwrite: bool, resume: bool, in_parts: bool) -> None:
    """UsageError where a folder holds something that is not to be replaced, or an unfinished run of the other kind."""
    names = {name for name in files.list_folder(path) if not name.startswith(LOCK)}
    if in_parts and JOURNAL in names:
        cure = "continue it with --resume alone, or choose another folder"
        raise UsageError(path, "holds an unfinished merge that is not done in parts", cure)
    if SHARDS in names and MANIFEST not in names and not overwrite:
        if in_parts or resume:
            return
        cure = "continue with --resume, or with --shard and --finish, or add --overwrite to start again"
        raise UsageError(path, "holds parts of an unfinished merge", cure)
    if overwrite or not names or (resume and names & {JOURNAL, JOURNAL + PARTIAL, MANIFEST}):
        return
    if JOURNAL in names:
        alone = "if no run is at work there, " if scheme_of(path) else ""  # where there is no lock, nobody knows
        cure = f"{alone}add --resume to go on, or --overwrite to start again"
        raise UsageError(path, "holds an unfinished merge", cure)
    what = "holds a finished merge" if MANIFEST in names else "is not empty"
    raise UsageError(path, what, "choose another folder or add --overwrite")
