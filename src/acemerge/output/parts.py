"""A part's place in the output folder: its files are written beside those of the others, none is published.

Parts hold the folder's lock together, so that no other run writes there and nobody finishes before they are done;
each holds the lock of its own notes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files, locks
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.header import TensorSpec, read_header
from acemerge.checkpoints.unfinished import MANIFEST, SHARDS
from acemerge.errors import AcemergeError, UsageError, shortages
from acemerge.output.counts import COUNTS, forget_counts
from acemerge.output.folder import RESUMABLE, OutputFolder, check_contents, check_output, remove_files
from acemerge.output.identity import difference
from acemerge.output.journal import read_findings, read_identity
from acemerge.output.names import LOCK, OLD
from acemerge.output.protocol import Output
from acemerge.output.store import findings_of_part, store_output
from acemerge.output.writer import PARTIAL, header_bytes
from acemerge.planning.parts import Part, part_of_folder

# What of a run's identity is of the machines that compute it, not of the one that puts its parts together.
_OF_MACHINES = ("device", "accelerator", "threads", "processor")
_TOLD = 8  # parts that an error names


def part_at(path: Path, part: Part, names: Iterable[str], overwrite: bool) -> contextlib.AbstractContextManager[Output]:
    """Hold a folder, or an address, for one part; see there."""
    if scheme_of(path):
        return store_output(path, overwrite, resume=True, in_parts=True, part=part)
    return part_output(path, part, names, overwrite)


@contextlib.contextmanager
def part_output(path: Path, part: Part, names: Iterable[str], overwrite: bool) -> Iterator[OutputFolder]:
    """The output folder, held for one part that writes files of these `names`.

    A failure removes these, unless the part can be continued. Raises as `output_folder` does.
    """
    check_output(path, overwrite, in_parts=True)
    files.make_folder(path)
    with locks.lock(path / LOCK, shared=True):
        check_contents(path, overwrite, False, True)
        if any(name == MANIFEST + PARTIAL or name.endswith(OLD) for name in files.list_folder(path)):
            raise UsageError(path, "--finish was interrupted here", "run --finish again, it puts this in order")
        output, notes = OutputFolder(path, part=part), path / part.folder
        output.check_own()
        for folder in (path / SHARDS, notes, path / COUNTS):
            if files.kind(folder) == "link":
                raise UsageError(folder, "is a link", "remove it: what parts note lies in OUT itself")
        files.make_folder(notes)
        with locks.lock(notes / LOCK):
            try:
                with shortages():
                    yield output
            except RESUMABLE:
                raise
            except BaseException:
                if output.begun:
                    with contextlib.suppress(AcemergeError):
                        _discard(path, part, names)
                raise


def _discard(path: Path, part: Part, names: Iterable[str]) -> None:
    for name in names:
        files.remove(path / (name + PARTIAL))
    remove_files(path / part.folder)
    forget_counts(path, part)
    files.remove_folder(path / SHARDS)


def _begun(path: Path) -> dict[Part, Mapping[str, Any]]:
    """The parts that have begun in `path`, in their order, and what run each is of. All are of one number of parts."""
    folder = path / SHARDS
    names = files.list_folder(folder) if files.kind(folder) == "folder" else []
    parts = sorted(part for part in map(part_of_folder, names) if part is not None)
    known = {part: read_identity(path / part.folder) for part in parts}
    found = {part: about for part, about in known.items() if about is not None}
    _check_number(path, found)
    return found


def _check_number(path: Path, parts: Iterable[Part]) -> None:
    numbers = sorted({part.of for part in parts})
    if len(numbers) > 1:
        cure = f"remove those that are not wanted from {path / SHARDS}"
        raise UsageError(path, f"holds parts of other runs: some of {numbers[0]}, some of {numbers[1]}", cure)


def begun_parts(path: Path, about: Mapping[str, Any]) -> int | None:
    """Of how many parts the run is that is begun in `path`; None where none is. UsageError where it is not `about`."""
    found = _begun(path)
    _check_alike(path, found, about)
    return next((part.of for part in found), None)


def holds_parts(path: Path) -> bool:
    """Whether parts have begun in `path`, of whatever run."""
    folder = path / SHARDS
    return files.kind(folder) == "folder" and any(map(part_of_folder, files.list_folder(folder)))


def found_by_others(path: Path, part: Part, about: Mapping[str, Any], key: str) -> Any:
    """What another part of the same run has noted under `key` before its first tensor; None where none has."""
    for other, known in _begun(path).items():
        if other != part and known == about:
            found = findings_of_part(path, other) if scheme_of(path) else read_findings(path / other.folder)
            if key in found:
                return found[key]
    return None


def check_begun(path: Path, part: Part, about: Mapping[str, Any]) -> None:
    """UsageError where parts that have begun are of another run than this one, which is `about` that."""
    found = _begun(path)
    _check_number(path, [part, *found])
    _check_alike(path, {other: known for other, known in found.items() if other != part}, about)


def all_parts(path: Path, about: Mapping[str, Any]) -> tuple[list[Part], Mapping[str, Any]]:
    """Every part of the run in `path`, and what that is: `about`, but for the machines, which are those of the parts.

    UsageError names the parts that are missing or of another run.
    """
    found = _begun(path)
    if not found:
        raise UsageError(path, "holds no part of a merge", "run the merge with --shard 1/N to N/N first")
    first, *_ = found
    every = [Part(first.of, number) for number in range(1, first.of + 1)]
    missing = [part for part in every if part not in found]
    if missing:
        names = listed([str(part) for part in missing])
        what = f"part {names} is missing" if len(missing) == 1 else f"parts {names} are missing"
        raise UsageError(path, what, f"run the merge with --shard {missing[0]}")
    run = {key: value for key, value in about.items() if key not in _OF_MACHINES}
    run |= {key: found[first][key] for key in _OF_MACHINES if key in found[first]}
    _check_alike(path, found, run)
    return every, run


def _check_alike(path: Path, found: Mapping[Part, Mapping[str, Any]], expected: Mapping[str, Any]) -> None:
    others = {part: difference(known, expected, verbs=("is", "and not")) for part, known in found.items()}
    told = [f"in part {part} {what}" for part, what in others.items() if what]
    if told:
        cure = "undo the change, or run the parts that differ again with --overwrite"
        raise UsageError(path, f"its parts are not all of this run: {listed(told)}", cure)


def listed(names: Sequence[str]) -> str:
    """As many of them as an error names."""
    return ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")


def put_together(output: Output, name: str, specs: Sequence[TensorSpec], sources: Sequence[str]) -> None:
    """Write a file with tensors that lie in several unfinished ones."""
    paths = [output.unfinished(source) for source in sources]
    places = {info.spec.name: info for path in paths for info in read_header(path)}

    def chunks() -> Iterator[bytes | memoryview]:
        yield header_bytes(specs)
        for spec in specs:
            value = memoryview(bytearray(spec.nbytes))
            descriptor = files.open_for_reading(places[spec.name].file)
            try:
                files.read_into(descriptor, [value], places[spec.name].offset, places[spec.name].file)
            finally:
                files.close(descriptor)
            yield value

    files.make_folder((output.path / name).parent)
    output.write_chunks(name, chunks())
