"""A merge that an executor computes in parts, from the first to what `--finish` finds."""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.hashes import check_unchanged, files_read, tensor_hashes
from acemerge.checkpoints.reader import Reader
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.engine.beside import inputs_of, origins_of, whole_sums, write_beside
from acemerge.engine.execute import Layout, OnProgress, Progress
from acemerge.engine.executor import Executor
from acemerge.engine.opening import Opened
from acemerge.engine.parts import gather
from acemerge.engine.run_options import RunOptions
from acemerge.errors import AcemergeError
from acemerge.output.folder import RESUMABLE, remove_files
from acemerge.output.identity import digest
from acemerge.output.manifest import build_manifest
from acemerge.output.names import WORK
from acemerge.output.parts import begun_parts
from acemerge.output.place import output_at
from acemerge.output.protocol import Output
from acemerge.output.writer import PARTIAL, write_file
from acemerge.planning.estimate import COMMON, piece_seconds
from acemerge.planning.parts import Part
from acemerge.planning.pieces import Piece

# Parts for each that is computed at once: all end at about the same time, and opening the models costs little beside.
_FOR_EACH = 8

log = logging.getLogger(__name__)


def machines_of(executor: Executor, output: Output, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the run is on the executor's machines. The output is held for this run."""
    marker = output.home / WORK / secrets.token_hex(8)
    try:
        write_file(marker, b"")
        return executor.machines(marker, about)
    finally:
        remove_files(marker.parent)


def parts_to_do(opened: Opened, output: Output, about: Mapping[str, Any], resumed: bool, slots: int) -> list[Part]:
    """All parts of the run: as many as have begun, else one for every file, or some for each of the slots."""
    files.remove(output.path / (MANIFEST + PARTIAL))  # of parts that were being put together
    begun = begun_parts(output.home, about) if resumed else None
    of = begun or min(len(opened.layout.every), _FOR_EACH * slots)
    return [Part(of, number) for number in range(1, of + 1)]


def compute_parts(
    opened: Opened, out: Path, parts: list[Part], executor: Executor, options: RunOptions, on_progress: OnProgress
) -> None:
    """Have all parts computed. What cannot be continued is removed."""
    about = {"event": "parts", "fields": {"out": out, "parts": len(parts), "slots": executor.slots}}
    log.info("%d parts, %d at once", len(parts), executor.slots, extra=about)
    told = _Together(opened, len(parts), on_progress)
    try:
        with closing(executor.compute(parts, told.of_part)) as done:
            for part in done:
                told.done(part)
    except AcemergeError as failure:
        if isinstance(failure, RESUMABLE):
            raise failure.resumable from failure
        with output_at(out, options.overwrite, resume=True, in_parts=True) as output:
            output.discard()
        files.remove_folder(out)
        raise


def put_together(opened: Opened, output: Output, about: Mapping[str, Any], hash_files: bool) -> dict[str, Any]:
    """Write what is beside the weights that all parts have computed, and return the manifest."""
    origins, found = origins_of(opened), gather(opened, output, about)
    with opened.pipeline(1, hashing=True) as (pipeline, readers):
        write_beside(opened, found.records, readers, origins, output)
        beside = [files_read(read) for read in pipeline.of_readers(Reader.hashes)]
    sums = whole_sums(opened, hash_files, found.sums)
    for checkpoint in opened.models:
        check_unchanged(checkpoint, {})
    inputs = inputs_of(opened, tensor_hashes([*found.read, *beside]), sums)
    manifest = build_manifest(opened.plan, found.records, inputs, output.written, 0.0)
    return manifest | {"run": digest(found.identity)}


class _Together:
    """The progress of all parts as that of one merge."""

    def __init__(self, opened: Opened, of: int, on_progress: OnProgress) -> None:
        layout = Layout(opened.plan, opened.max_shard)
        jobs, experts = {job.name: job for job in opened.plan.jobs}, len(opened.plan.experts)
        self._all: dict[int, Progress] = {}
        work: dict[int, float] = defaultdict(float)
        for (_, specs), number in zip(layout.every, layout.spread_over(of), strict=True):
            pieces = [Piece(jobs[spec.name]) for spec in specs]
            work[number] += sum(piece_seconds(piece, experts, COMMON) for piece in pieces)
            nbytes, written = sum(piece.bytes_in for piece in pieces), sum(spec.nbytes for spec in specs)
            self._all[number] = _added(self._all.get(number, _NOTHING), len(specs), nbytes, written)
        self._work, self._now, self._tell = dict(work), dict.fromkeys(self._all, _NOTHING), on_progress

    def of_part(self, part: Part, now: Progress) -> None:
        """A part got on. Before its first tensor it may count something of the whole model, as others do, too."""
        if now.stage != "merge":
            if not any(found.done for found in self._now.values()):
                self._tell(now)
            return
        whole = self._all[part.number]
        done = whole.done - (now.total - now.done)  # of one that was continued, what is left is counted
        nbytes = whole.bytes_done - (now.bytes_total - now.bytes_done)
        self._say(part, Progress("merge", now.name, done, 0, nbytes, 0, now.bytes_out, now.share))

    def done(self, part: Part) -> None:
        self._say(part, self._all[part.number])

    def _say(self, part: Part, now: Progress) -> None:
        self._now[part.number] = now
        own, every = self._now.values(), self._all.values()
        share = sum(self._work[number] * found.share for number, found in self._now.items())
        self._tell(
            Progress(
                "merge",
                now.name or f"part {part}",
                sum(found.done for found in own),
                sum(found.done for found in every),
                sum(found.bytes_done for found in own),
                sum(found.bytes_done for found in every),
                sum(found.bytes_out for found in own),
                share / (sum(self._work.values()) or 1.0),
            )
        )


_NOTHING = Progress("merge", "", 0, 0, 0, 0)


def _added(found: Progress, done: int, nbytes: int, written: int) -> Progress:
    """All that a part does, with one more of its files."""
    return Progress("merge", "", found.done + done, 0, found.bytes_done + nbytes, 0, found.bytes_out + written, 1.0)
