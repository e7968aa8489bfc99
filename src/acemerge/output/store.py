"""An output in a store of objects, in which nothing can be renamed and nobody holds a lock.

A run claims its place with an object that must be new, `.acemerge.journal`, which says what run it is. Files are
written to this machine one after the other, and each is uploaded when it is whole, then removed here; a note beside it
says what it holds, so that `--resume` goes on, from any machine. The manifest is the last object, and must be new:
whoever comes second is refused. What has no manifest is not finished.

An output that is replaced loses its manifest before the first of its objects: a store can not exchange them at once.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from acemerge.checkpoints import files, objects
from acemerge.checkpoints.hashes import Hashed, Read
from acemerge.checkpoints.store import Stat
from acemerge.errors import AcemergeError, CheckpointError, UsageError, WriteError
from acemerge.output.folder import (
    MANIFEST,
    REPORT,
    WORK,
    check_contents,
    check_output,
    is_output,
    side_folders,
    to_write,
    undone_on_failure,
)
from acemerge.output.identity import digest
from acemerge.output.journal import (
    JOURNAL,
    MAX_JOURNAL,
    Done,
    Journal,
    Step,
    entries_of,
    entry_of,
    read_entry,
    read_of,
    spelled,
    step_of,
)
from acemerge.output.writer import PARTIAL, FileSum, write_partial

_OTHER_BEGAN = "another run has begun to write here"
_ELSEWHERE = "choose another address"
_BUSY = "wait for it, or choose another address; if none is at work, add --resume to go on or --overwrite"


@dataclass
class StoreOutput:
    """The files of one run: written at `path`, on this machine, and uploaded to `target`."""

    target: Path
    path: Path
    overwrite: bool
    resume: bool
    written: dict[str, FileSum] = field(default_factory=dict)
    begun: bool = False
    kept: bool = False
    _claim: bytes = b""
    _run: str = ""
    _replaces: bool = False  # an output that is finished
    _journal: Journal | None = None  # beside the files, on this machine
    _steps: dict[str, list[Step]] = field(default_factory=dict)
    _told: dict[str, dict[str, Hashed]] = field(default_factory=dict)  # of what was read, in notes
    _there: dict[str, Stat] = field(default_factory=dict)  # uploaded
    _uploads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "acemerge-upload"))
    _uploading: Future[None] | None = None

    @property
    def work(self) -> Path:
        return self.path / WORK

    @property
    def _notes(self) -> Path:
        return self.target / WORK

    # --- going on -------------------------------------------------------------------------------------------

    def left(self, names: Collection[str]) -> Done | None:
        """By the notes of the files that are still as they were uploaded."""
        with to_write():
            return self._left(names)

    def _left(self, names: Collection[str]) -> Done | None:
        self._claim = self._claimed() or b""
        entries = entries_of(self._claim)
        if not entries or "identity" not in entries[0]:
            return None
        about, steps, notes = entries[0]["identity"], [], []
        for key in objects.stats_below(self._notes):
            note = entries_of(objects.read_small(self._notes / key, MAX_JOURNAL))
            if note and note[0].get("run") == digest(about) and note[0].get("file") in names:
                steps += self._taken(note)
                notes += note
        done = [step for step in steps if step is not None and step.files.keys() <= self._there.keys()]
        self.written |= {name: total for step in done for name, total in step.files.items()}
        self._there = {name: stat for name, stat in self._there.items() if name in self.written}
        findings = {key: value for entry in entries[1:] for key, value in entry.get("findings", {}).items()}
        return Done(about, findings, tuple(done), read=read_of(notes))

    def _taken(self, note: Sequence[Mapping[str, object]]) -> list[Step | None]:
        """The steps of a file, if it is there as the note says."""
        name = str(note[0]["file"])
        now = objects.find(self.target / name)
        if now is None or [now.size, now.etag, now.version] != note[0]["stat"]:
            return []
        self._there[name] = now
        return [step_of(entry) for entry in note if "tensor" in entry]

    def _claimed(self) -> bytes | None:
        try:
            return objects.read_small(self.target / JOURNAL, MAX_JOURNAL)
        except CheckpointError:
            return None if objects.find(self.target / JOURNAL) is None else b""

    def begin(self, done: Done) -> Journal:
        """Claim the place, unless this very run has it already."""
        self._run = digest(done.identity)
        claimed = entries_of(self._claim) if self.resume else []
        with to_write():
            if not claimed or claimed[0].get("identity") != done.identity:
                self._take(done)
            self._replaces = objects.find(self.target / MANIFEST) is not None
            if self._replaces and not (self.overwrite or claimed):  # it came since this run looked
                objects.delete(self.target / JOURNAL)
                raise WriteError(self.target, "another run has finished here", _ELSEWHERE)
        self.begun = True
        self._journal = Journal(self.path, done)
        return self._journal

    def _take(self, done: Done) -> None:
        if self.overwrite or self._claim:
            self._remove_notes()
            objects.delete(self.target / JOURNAL)
        # Told apart from that of a like run by a word of its own.
        self._claim = spelled([{"identity": done.identity}, {"by": secrets.token_hex(16)}])
        try:
            objects.put(self.target / JOURNAL, self._claim, new=True)
        except FileExistsError:
            raise WriteError(self.target, "another run is writing here", _BUSY) from None

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
            there = self._there[name]
            head = {"run": self._run, "file": name, "stat": [there.size, there.etag, there.version]}
            objects.put(self._notes / name, spelled([head, read_entry(read), *map(entry_of, steps)]))

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
            self._remove_notes()
            objects.delete(self.target / JOURNAL)

    def _check_claim(self) -> None:
        if self._claimed() != self._claim:
            raise WriteError(self.target, _OTHER_BEGAN, _ELSEWHERE)

    def _check_still_own(self) -> None:
        """The place may have been taken since it was looked at last; then the other has begun to replace objects."""
        try:
            claimed = self._claimed()
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
        if self._claim and self._claimed() != self._claim:
            return
        if objects.find(self.target / MANIFEST) is None:
            for name in self._noted() | self._there.keys():
                objects.delete(self.target / name)
        self._remove_notes()
        objects.delete(self.target / JOURNAL)

    def _noted(self) -> set[str]:
        return {key for key in objects.stats_below(self._notes) if is_output(key)}

    def _remove_notes(self) -> None:
        for key in objects.stats_below(self._notes):
            objects.delete(self._notes / key)

    def check_own(self) -> None:
        """UsageError where objects that are no output of ours would be replaced."""
        names = files.list_folder(self.target)
        foreign = [] if {MANIFEST, JOURNAL} & set(names) else sorted(set(self._outputs()) - {REPORT})
        if foreign:
            what = f"holds {foreign[0]}, which no merge has written, as there is no {MANIFEST}"
            raise UsageError(self.target, what, "choose another address, or move the file away")

    def close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def store_output(target: Path, overwrite: bool, resume: bool) -> Iterator[StoreOutput]:
    """Hold an address for one run. A failure removes what was not published, unless the run can be continued.

    Raises UsageError where there is something that is not to be replaced, WriteError where the store takes nothing.
    """
    check_output(target, overwrite, resume)
    with to_write():
        check_contents(target, overwrite, resume, in_parts=False)
    output = StoreOutput(target, _spool(), overwrite, resume)
    try:
        with to_write():
            output.check_own()
        with undone_on_failure(output):
            yield output
    finally:
        output.close()


def _spool() -> Path:
    """A folder for files until they are uploaded."""
    try:
        return Path(tempfile.mkdtemp(prefix="acemerge-"))
    except OSError as failure:
        what = f"cannot be written to ({failure.strerror})"
        raise WriteError(tempfile.gettempdir(), what, "free space, or set TMPDIR to another folder") from None
