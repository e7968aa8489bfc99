"""An output in a store of objects, in which nothing can be renamed and nobody holds a lock.

A run claims its place with an object that must be new, `.acemerge.journal`, which says what run it is. Files are
written to this machine one after the other, and each is uploaded when it is whole, then removed here; a note beside it
says what it holds, so that `--resume` goes on, from any machine. The manifest is the last object, and must be new:
whoever comes second is refused. What has no manifest is not finished.

A part of a run claims a place of its own within that, and notes its files there; whoever puts the parts together
claims nothing, as the manifest can be new only once.

An output that is replaced loses its manifest before the first of its objects: a store can not exchange them at once.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from acemerge.checkpoints import files, objects
from acemerge.checkpoints.hashes import Hashed, Read, longer
from acemerge.checkpoints.store import Stat
from acemerge.checkpoints.unfinished import JOURNAL, MANIFEST, SHARDS
from acemerge.errors import AcemergeError, UsageError, WriteError
from acemerge.output.counts import forget_counts
from acemerge.output.folder import check_contents, check_output, to_write, undone_on_failure
from acemerge.output.identity import digest
from acemerge.output.journal import Done, Journal, Step, entries_of
from acemerge.output.names import REPORT, WORK, is_output, side_folders
from acemerge.output.notes import Notes
from acemerge.output.writer import PARTIAL, FileSum, write_partial
from acemerge.planning.parts import Part, part_of_folder

_OTHER_BEGAN = "another run has begun to write here"
_ELSEWHERE = "choose another address"
_ROOM = "free space, or set TMPDIR to another folder"
_BUSY = "wait for it, or choose another address; if none is at work, add --resume to go on or --overwrite"


@dataclass
class StoreOutput:
    """The files of one run: written at `path`, on this machine, and uploaded to `target`."""

    target: Path
    path: Path
    overwrite: bool
    resume: bool
    part: Part | None = None
    written: dict[str, FileSum] = field(default_factory=dict)
    begun: bool = False
    kept: bool = False
    _claim: bytes = b""
    _run: str = ""
    _replaces: bool = False  # an output that is finished
    _journal: Journal | None = None  # beside the files, on this machine
    _steps: dict[str, list[Step]] = field(default_factory=dict)
    _told: dict[str, dict[str, Hashed]] = field(default_factory=dict)  # of what was read, in notes
    _found_with: dict[str, Mapping[str, Hashed] | None] = field(default_factory=dict)  # in the note of findings
    _there: dict[str, Stat] = field(default_factory=dict)  # uploaded
    _uploads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "acemerge-upload"))
    _uploading: Future[None] | None = None

    @property
    def home(self) -> Path:
        return self.target

    @property
    def work(self) -> Path:
        return self.path / WORK

    @property
    def _notes(self) -> Notes:
        return Notes(self.target if self.part is None else self.target / self.part.folder)

    # --- going on -------------------------------------------------------------------------------------------

    def left(self, names: Collection[str]) -> Done | None:
        """By the notes of the files that are still as they were uploaded."""
        with to_write():
            self._claim = self._notes.claimed() or b""
            done = self._left(self._notes, self._claim, names)
        self.written |= {} if done is None else done.sums
        return done

    def left_by(self, part: Part, names: Collection[str]) -> Done | None:
        notes = Notes(self.target / part.folder)
        with to_write():
            return self._left(notes, notes.claimed() or b"", names)

    def _left(self, notes: Notes, claim: bytes, names: Collection[str]) -> Done | None:
        found = notes.left(claim, self.target, names)
        if found is None:
            return None
        done, there = found
        self._there |= there
        return done

    def unfinished(self, name: str) -> Path:
        return self.target / name

    def begin(self, done: Done) -> Journal:
        """Claim the place, unless this very run has it already. A part takes it over from a process that was lost."""
        self._run = digest(done.identity)
        claimed = entries_of(self._claim) if self.resume else []
        own = bool(claimed) and claimed[0].get("identity") == done.identity
        with to_write():
            if not own:
                self._take(done)
            elif self.part is not None:
                self._claim = self._notes.claim(done.identity, new=False)
            self._replaces = objects.find(self.target / MANIFEST) is not None
            if self._replaces and not (self.overwrite or (own and self.part is None)):  # it came since this run looked
                self._notes.forget()
                raise WriteError(self.target, "another run has finished here", _ELSEWHERE)
        self.begun = True
        self._journal = Journal(self.path, done, self._note_findings)
        return self._journal

    def _take(self, done: Done) -> None:
        if self.overwrite or self._claim:
            self._forget()
        try:
            self._claim = self._notes.claim(done.identity, new=True)
        except FileExistsError:
            raise WriteError(self.target, "another run is writing here", _BUSY) from None

    def _note_findings(self, findings: Mapping[str, Any]) -> None:
        for path, new in self._news().items():
            self._found_with[path] = longer(self._found_with.get(path, {}), new)
        with to_write():
            self._notes.note_findings(self._run, findings, self._found_with)

    # --- writing --------------------------------------------------------------------------------------------

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        partial = self.path / name
        files.make_folder(partial.parent)
        self.written[name] = write_partial(partial, chunks)

    def complete(self, steps: Sequence[Step], finished: Mapping[str, FileSum]) -> None:
        """Upload what is whole while the next is computed; no more than one file waits for that."""
        for step in (step for step in steps if step.files):  # what an adapter holds nothing of has none
            self._steps.setdefault(next(iter(step.files)), []).append(step)
        for name in finished:
            if name in self._steps and name not in self._there:
                self._wait()
                self._there[name] = Stat(0)
                self._uploading = self._uploads.submit(self._ship_noted, name, self._steps.pop(name), self._news())

    def _news(self) -> Read:
        """What was read of the inputs and stands in no note yet."""
        news: dict[str, dict[str, Hashed] | None] = {}
        for path, parts in (self._journal.read if self._journal else {}).items():
            known = self._told.setdefault(path, {})
            new = None if parts is None else {name: part for name, part in parts.items() if known.get(name) != part}
            if new is None or new:
                news[path] = new
                known |= new or {}
        return news

    def _wait(self) -> None:
        if self._uploading is not None:
            self._uploading.result()

    def _ship_noted(self, name: str, steps: Sequence[Step], read: Read) -> None:
        with to_write():
            self._ship(name)
            self._notes.note_file(self._run, name, self._there[name], steps, read)

    def keep(self) -> None:
        """Upload what no step was the last of: masks."""
        self._wait()
        for name in self.written:
            if name not in self._there:
                self._ship_noted(name, (), {})

    def _ship(self, name: str) -> None:
        """Upload a file, and look whether it is there."""
        partial, target = self.path / (name + PARTIAL), self.target / name
        self._check_claim()
        if self._replaces:  # before its first object is, the earlier output is none any more
            objects.delete(self.target / MANIFEST)
            self._replaces = False
        sent = objects.upload(target, partial)
        now = objects.find(target)
        if now is None or now.size != sent.size or (sent.etag and now.etag != sent.etag):
            self._taken_by_another(target)
        self._there[name] = now
        files.remove(partial)

    def publish(self, manifest: bytes) -> None:
        """Upload what is left, remove what an earlier output had beside it, write the manifest."""
        self._wait()
        with to_write():
            self._publish(manifest)

    def _publish(self, manifest: bytes) -> None:
        for name in self.written:
            if name not in self._there:
                self._ship(name)
        for name in self._outputs():
            if name not in self.written and name != MANIFEST:
                objects.delete(self.target / name)
        self._check_claim()
        for name, stat in self._there.items():
            if objects.find(self.target / name) != stat:
                self._taken_by_another(self.target / name)
        try:
            objects.put(self.target / MANIFEST, manifest, new=True)
        except FileExistsError:
            raise WriteError(self.target, "another run has finished here", _ELSEWHERE) from None
        self._check_still_own()
        with contextlib.suppress(AcemergeError):  # the output is there: what is left does no harm
            self._forget()

    def _check_claim(self) -> None:
        if (self._notes.claimed() or b"") != self._claim:
            raise WriteError(self.target, _OTHER_BEGAN, _ELSEWHERE)

    def _check_still_own(self) -> None:
        """The place may have been taken since it was looked at last; then the other has begun to replace objects."""
        try:
            claimed = self._notes.claimed() or b""
        except AcemergeError:  # the manifest is there: that the store is silent now changes nothing
            return
        if claimed != self._claim:
            objects.delete(self.target / MANIFEST)
            raise WriteError(self.target, _OTHER_BEGAN, _ELSEWHERE)

    def _taken_by_another(self, target: Path) -> NoReturn:
        what = "is not as it was uploaded: another run is writing here, or the store lost it"
        raise WriteError(target, what, "see that no other run is at work, then go on with --resume")

    def _outputs(self) -> list[str]:
        """The objects here that acemerge writes, under their names in a manifest."""
        names = files.list_folder(self.target)
        for folder in side_folders(self.target):
            names += [f"{folder}/{name}" for name in files.list_folder(self.target / folder)]
        return [name for name in names if is_output(name)]

    # --- doing away with it ---------------------------------------------------------------------------------

    def discard(self) -> None:
        """Remove what this run, or the one whose place it takes, has uploaded and noted; nothing of a finished one."""
        with contextlib.suppress(AcemergeError):
            self._wait()
        if self._claim and self._notes.claimed() != self._claim:
            return
        if objects.find(self.target / MANIFEST) is None:
            for name in self._noted() | self._there.keys():
                objects.delete(self.target / name)
        self._forget()

    def _noted(self) -> set[str]:
        """The files of this run, or of the part, or of all parts, that have notes."""
        every = [self._notes] if self.part is not None else [self._notes, *map(Notes, part_homes(self.target))]
        return {name for notes in every for name in notes.names() if is_output(name) or name.startswith(f"{SHARDS}/")}

    def _forget(self) -> None:
        """Remove all that is noted, those of parts with their masks and counts."""
        if self.part is None:
            self.forget_parts()
        else:
            forget_counts(self.target, self.part)
        self._notes.forget()

    def forget_parts(self) -> None:
        forget_counts(self.target)
        for home in part_homes(self.target):
            for name in objects.stats_below(home):
                if name != JOURNAL:
                    objects.delete(home / name)
            objects.delete(home / JOURNAL)

    def check_own(self) -> None:
        """UsageError where objects that are no output of ours would be replaced."""
        names = files.list_folder(self.target)
        foreign = [] if {MANIFEST, JOURNAL, SHARDS} & set(names) else sorted(set(self._outputs()) - {REPORT})
        if foreign:
            what = f"holds {foreign[0]}, which no merge has written, as there is no {MANIFEST}"
            raise UsageError(self.target, what, "choose another address, or move the file away")

    def close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.path, ignore_errors=True)


def part_homes(target: Path) -> list[Path]:
    """Where the parts that have begun at an address have their notes."""
    names = files.list_folder(target / SHARDS)
    return [target / SHARDS / name for name in names if part_of_folder(name) is not None]


def findings_of_part(target: Path, part: Part) -> Mapping[str, Any]:
    """What a part has found out beside its tensors."""
    return Notes(target / part.folder).findings()


@contextlib.contextmanager
def store_output(
    target: Path, overwrite: bool, resume: bool, in_parts: bool = False, part: Part | None = None
) -> Iterator[StoreOutput]:
    """Hold an address for one run, or for a `part` of one; `in_parts`, what parts have written is kept. A failure
    removes what was not published, unless the run can be continued.

    Raises UsageError where there is something that is not to be replaced, WriteError where the store takes nothing.
    """
    goes_on = resume and part is None  # a part is a run of its own, whatever of it is done
    check_output(target, overwrite, goes_on, in_parts)
    with to_write():
        check_contents(target, overwrite, goes_on, in_parts)
    output = StoreOutput(target, _spool(), overwrite, resume, part)
    try:
        with to_write():
            output.check_own()
            if overwrite and not (resume or in_parts):
                output.forget_parts()
        with undone_on_failure(output), _within(output.path):
            yield output
    finally:
        output.close()


@contextlib.contextmanager
def _within(spool: Path) -> Iterator[None]:
    """Where it is this machine that takes no more, another address for the output would not help."""
    try:
        yield
    except WriteError as failure:
        if not Path(failure.where).is_relative_to(spool):
            raise
        cure = f"{_ROOM}, then go on with --resume"
        raise WriteError(failure.where, f"cannot be written to ({failure.what})", cure) from failure


def _spool() -> Path:
    """A folder for files until they are uploaded."""
    try:
        return Path(tempfile.mkdtemp(prefix="acemerge-"))
    except OSError as failure:
        what = f"cannot be written to ({failure.strerror})"
        raise WriteError(tempfile.gettempdir(), what, _ROOM) from None
