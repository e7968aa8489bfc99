"""What of an unfinished run is done: one line per step, so that a killed run can be continued.

A line says which tensor was finished and, for every file written to, how many bytes there were then and their
SHA-256. Going on, the files are hashed again and cut to the last step that they prove. A line that was torn, or
that is not as it was written, ends the journal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.hashes import Hashed, Read, longer
from acemerge.checkpoints.unfinished import JOURNAL
from acemerge.errors import CheckpointError
from acemerge.output.records import TensorRecord
from acemerge.output.writer import PARTIAL, Begun, FileSum

MAX_JOURNAL = 1 << 30
_BLOCK = 1 << 22
_CHECK = 16


@dataclass(frozen=True)
class Step:
    """A finished tensor: its record for the manifest, and how far each file was that it went to."""

    tensor: str
    record: TensorRecord
    files: Mapping[str, FileSum]


@dataclass(frozen=True)
class Done:
    """What an unfinished run left: what it was, what it found out beforehand, and its proven steps.

    `read` says what those may depend on of every input. `damaged` is the file that is not as a further step says.
    """

    @property
    def sums(self) -> dict[str, FileSum]:
        """Of every file that steps went to, how far it is."""
        return {name: total for step in self.steps for name, total in step.files.items()}

    identity: Mapping[str, Any]
    findings: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    begun: Mapping[str, Begun] = field(default_factory=dict)
    read: Read = field(default_factory=dict)
    damaged: str | None = None


class Journal:
    """The journal of one run, open for writing."""

    def __init__(self, folder: Path, done: Done, also: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        """Begin a journal with what is known to be done: a new one in the place of any other.

        `also` is told of all findings whenever there are more.
        """
        self._path = folder / JOURNAL
        fresh = folder / (JOURNAL + PARTIAL)
        files.remove(fresh)
        self._descriptor, self._length = files.create(fresh), 0
        self._write([{"identity": done.identity}, *([{"findings": done.findings}] if done.findings else [])])
        self._findings, self._also = dict(done.findings), also
        self.add(done.steps)
        self.read: dict[str, Mapping[str, Hashed] | None] = {}
        self.have_read(done.read)
        files.close(self._descriptor)  # Windows renames no open file
        files.rename(fresh, self._path)
        self._descriptor = files.reopen(self._path, self._length)

    def found(self, findings: Mapping[str, Any]) -> None:
        """Note what was found out beside the tensors."""
        self._write([{"findings": findings}])
        self._findings |= findings
        if self._also is not None:
            self._also(self._findings)

    def add(self, steps: Iterable[Step]) -> None:
        self._write(map(entry_of, steps))

    def have_read(self, news: Read) -> None:
        """Note how far inputs were read, before the steps that come of it."""
        for path, new in news.items():
            self.read[path] = longer(self.read.get(path, {}), new)
        self._write([read_entry(news)] if news else [])

    def close(self) -> None:
        files.close(self._descriptor)

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        text = spelled(entries)
        if text:
            files.write_all(self._descriptor, text, self._path)
            self._length += len(text)


def spelled(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """Entries as lines, each behind its own check."""
    lines = [json.dumps(entry, separators=(",", ":")).encode() for entry in entries]
    return b"".join(_check(line) + b" " + line + b"\n" for line in lines)


def entry_of(step: Step) -> dict[str, Any]:
    totals = {name: [total.nbytes, total.sha256] for name, total in step.files.items()}
    return {"tensor": step.tensor, "record": step.record.to_json(), "files": totals}


def read_entry(read: Read) -> dict[str, Any]:
    def plain(part: Hashed) -> list[Any]:
        return [part.offset, part.of, part.nbytes, part.sha256]

    return {
        "read": {
            path: None if parts is None else {name: plain(part) for name, part in parts.items()}
            for path, parts in read.items()
        }
    }


def read_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Hashed] | None]:
    """What all entries together say of what was read."""
    read: dict[str, Mapping[str, Hashed] | None] = {}
    for entry in entries:
        for path, parts in entry.get("read", {}).items():
            new = None if parts is None else {name: Hashed(*part) for name, part in parts.items()}
            read[path] = longer(read.get(path, {}), new)
    return read


def read_identity(folder: Path) -> Mapping[str, Any] | None:
    """What the run is whose journal is in `folder`; None where there is none."""
    entries = _journal(folder)
    return entries[0]["identity"] if entries else None


def read_findings(folder: Path) -> Mapping[str, Any]:
    """What the run found out beforehand whose journal is in `folder`."""
    found: dict[str, Any] = {}
    for entry in _journal(folder):
        found |= entry.get("findings", {})
    return found


def _journal(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOURNAL
    entries = entries_of(files.read_small(path, MAX_JOURNAL)) if files.kind(path) == "file" else []
    return entries if entries and "identity" in entries[0] else []


def read_journal(folder: Path, names: Collection[str], within: str = "") -> Done | None:
    """What an unfinished run in `folder` has done; None where there is none, or none that can be continued.

    Only files of these `names` are opened, whatever the journal says. `within` is the folder therein that has the
    journal.
    """
    entries = _journal(folder / within)
    if not entries:
        return None
    findings: dict[str, Any] = {}
    steps: list[Step] = []
    proof = _Proof(folder)
    try:
        for entry in entries[1:]:
            findings |= entry.get("findings", {})
            if "tensor" not in entry:
                continue
            step = step_of(entry)
            if step is None or not (step.files.keys() <= set(names) and proof.holds(step.files)):
                break
            steps.append(step)
    finally:
        proof.close()
    return Done(entries[0]["identity"], findings, tuple(steps), proof.begun, read_of(entries), proof.failed)


def step_of(entry: Mapping[str, Any]) -> Step | None:
    """None where its record is not one that this version writes."""
    sums = {name: FileSum(sha256, nbytes) for name, (nbytes, sha256) in entry["files"].items()}
    try:
        return Step(entry["tensor"], TensorRecord.from_json(entry["record"]), sums)
    except ValueError:
        return None


def entries_of(text: bytes) -> list[dict[str, Any]]:
    """The entries of lines, up to the first that is not as it was written."""
    entries = []
    for line in text.split(b"\n")[:-1]:
        check, _, content = line.partition(b" ")
        if check != _check(content):
            break
        entries.append(json.loads(content))
    return entries


def _check(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:_CHECK].encode()


class _Proof:
    """Unfinished files, hashed from their beginning step by step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, files.Handle] = {}
        self.begun: dict[str, Begun] = {}
        self.failed: str | None = None

    def holds(self, expected: Mapping[str, FileSum]) -> bool:
        """Whether the files' first bytes are those that a step tells of."""
        found = {}
        for name, total in expected.items():
            try:
                found[name] = self._hashed(name, total.nbytes)
            except CheckpointError:  # not there, or shorter: the step is to be done again
                self.failed = name
                return False
            if found[name].sum != total:
                self.failed = name
                return False
        self.begun |= found
        return True

    def _hashed(self, name: str, nbytes: int) -> Begun:
        before = self.begun.get(name, Begun(0, hashlib.sha256()))
        digest, position, path = before.digest.copy(), before.nbytes, self._folder / (name + PARTIAL)
        if name not in self._open:
            self._open[name] = files.open_for_reading(path)
        while position < nbytes:
            block = memoryview(bytearray(min(_BLOCK, nbytes - position)))
            files.read_into(self._open[name], [block], position, path)
            digest.update(block)
            position += len(block)
        return Begun(position, digest, before.steps + 1)

    def close(self) -> None:
        for descriptor in self._open.values():
            files.close(descriptor)
