"""Executes a plan: streams its pieces, writes them in order, and notes what is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import HEADS, in_module
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.hashes import Hashed, Read, longer
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.lora import ADAPTER_MODEL
from acemerge.checkpoints.reader import Reader, Span
from acemerge.engine.batched import compute_all
from acemerge.engine.compute import Computed, whole_record
from acemerge.engine.pipeline import Pipeline
from acemerge.engine.thresholds import Count, with_thresholds
from acemerge.engine.work import Loaded, Place, Result, Setting, Walk, Work
from acemerge.output.journal import Done, Journal
from acemerge.output.names import MASKS
from acemerge.output.packed_masks import mask_spec
from acemerge.output.protocol import Output
from acemerge.output.records import TensorRecord
from acemerge.output.writer import TensorFiles, split_shards
from acemerge.planning.costs import bytes_written
from acemerge.planning.estimate import COMMON, piece_seconds
from acemerge.planning.finite import check_finite
from acemerge.planning.jobs import AnyJob, Job, Plan
from acemerge.planning.parts import Part, spread
from acemerge.planning.pieces import Piece, pieces
from acemerge.shapes import Tensor

Records = dict[str, TensorRecord]


@dataclass(frozen=True)
class Progress:
    """How far a stage is, for whoever shows it; `name` is the last tensor done, `unit` what is counted.

    `bytes_done` of `bytes_total` are read, `bytes_out` are written where the stage writes. `share` of the work is done:
    tensors of one size may take very different times.
    """

    stage: str
    name: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int
    bytes_out: int = 0
    share: float = 0.0
    unit: str = "tensors"


OnProgress = Callable[[Progress], None]


def walker(pipeline: Pipeline, stage: str, on_progress: OnProgress, writes: bool = False) -> Walk:
    """Goes through pieces by the pipeline and tells of every batch when its result was dealt with."""

    def work_of(piece: Piece[Job]) -> float:
        return sum(piece_seconds(own, pipeline.experts, COMMON) for own in piece.each)

    def walk(parts: Iterable[Piece[AnyJob]], work: Work[AnyJob, Result]) -> Generator[Result, None, None]:
        queue = list(parts)
        total, bytes_total = sum(piece.is_last for piece in queue), sum(piece.bytes_in for piece in queue)
        work_total = sum(map(work_of, queue))
        done = bytes_done = bytes_out = 0
        work_done = 0.0
        for batch, result in pipeline.stream(queue, work):
            yield result
            done += sum(piece.is_last for piece in batch)
            bytes_done += sum(piece.bytes_in for piece in batch)
            bytes_out += sum(bytes_written(own) for piece in batch for own in piece.each) if writes else 0
            work_done += sum(map(work_of, batch))
            share = work_done / work_total if work_total else 1.0
            on_progress(Progress(stage, batch[-1].job.name, done, total, bytes_done, bytes_total, bytes_out, share))

    return walk


@dataclass(frozen=True)
class Layout:
    """Which files the weights go to, and the order in which they are written; of a part, those that are its own."""

    plan: Plan
    max_shard: int
    part: Part | None = None

    @cached_property
    def shards(self) -> list[tuple[str, list[TensorSpec]]]:
        specs = [spec for job in self.plan.jobs for spec in job.stored if not in_module(spec.name)[0]]
        if self.plan.is_adapter:
            return [(ADAPTER_MODEL, specs)]
        return split_shards(specs, self.max_shard) if specs or not self.modules else []  # a pipeline has none

    @cached_property
    def modules(self) -> list[tuple[str, list[TensorSpec]]]:
        """The files of what lies behind a transformer, as its dense layers, and of a pipeline's components.

        Wide types come first, as in shards.
        """
        found: dict[str, list[TensorSpec]] = {}
        for spec in sorted((spec for job in self.plan.jobs for spec in job.stored), key=lambda s: -s.dtype.itemsize):
            file, _ = in_module(spec.name)
            if file:
                found.setdefault(file, []).append(spec)
        return list(found.items())

    @cached_property
    def own(self) -> list[tuple[str, list[TensorSpec]]]:
        """Of the shards and the modules' files those that are written: all, or the part's by the work that they are."""
        if self.part is None:
            return self.every
        numbers = self.spread_over(self.part.of)
        return [entry for entry, number in zip(self.every, numbers, strict=True) if number == self.part.number]

    @cached_property
    def every(self) -> list[tuple[str, list[TensorSpec]]]:
        """The shards and the modules' files of the whole, whatever the part."""
        return [*self.shards, *self.modules]

    def spread_over(self, parts: int) -> list[int]:
        """For each of all files the number of the part that writes it."""
        experts, by_name = len(self.plan.experts), {job.name: job for job in self.plan.jobs}
        work = [sum(piece_seconds(Piece(by_name[s.name]), experts, COMMON) for s in specs) for _, specs in self.every]
        return spread(work, parts)

    @cached_property
    def jobs(self) -> list[Job]:
        if self.plan.is_adapter:
            return list(self.plan.jobs)
        by_name = {job.name: job for job in self.plan.jobs}
        return [by_name[spec.name] for _, specs in self.own for spec in specs]

    @cached_property
    def masks(self) -> dict[str, list[TensorSpec]]:
        """One file of masks per expert where a rule makes masks. A part has its own, to be put together."""
        specs = [mask_spec(job.spec) for job in self.jobs if job.makes_masks]
        folder = MASKS if self.part is None else self.part.folder
        return {f"{folder}/{label}.safetensors": specs for label in self.plan.experts} if specs else {}

    @cached_property
    def files(self) -> dict[str, list[TensorSpec]]:
        """The shards, the modules' files, and those of masks."""
        modules = {file for file, _ in self.modules}
        own = {f: [replace(s, name=in_module(s.name)[1]) for s in ss] if f in modules else ss for f, ss in self.own}
        return own | self.masks

    @cached_property
    def goes_to(self) -> dict[str, list[str]]:
        """For every tensor the shard of what is stored of it, then the files of its masks."""
        shard = {spec.name: file for file, specs in self.own for spec in specs}
        return {
            job.name: [*(shard[spec.name] for spec in job.stored), *(self.masks if job.makes_masks else [])]
            for job in self.jobs
        }

    @cached_property
    def steps(self) -> Mapping[str, int]:
        """How many tensors of the plan write to each file."""
        return Counter(file for files in self.goes_to.values() for file in set(files))


def dry_run(plan: Plan, setting: Setting, walk: Walk) -> Records:
    """Compute everything and keep nothing but the records."""
    records = Gathered()
    work = merging(setting)
    for results in walk((piece for job in plan.jobs for piece in pieces(job, job.entrywise)), work):
        for piece, computed in results:
            records.add(piece, computed)
    return records.done


def find_thresholds(
    plan: Plan, setting: Setting, count: Count, done: Done, journal: Journal, readers: Sequence[Reader]
) -> Setting:
    """The setting with its thresholds, those of an interrupted run if it got as far."""
    if "thresholds" in done.findings:
        return replace(setting, thresholds=dict(done.findings["thresholds"]))
    setting = with_thresholds(setting, plan, count)
    if setting.thresholds:
        journal.have_read(read_by(readers))
        journal.found({"thresholds": [[keep, list(values)] for keep, values in setting.thresholds.items()]})
    return setting


def read_by(readers: Sequence[Reader]) -> Read:
    """What was read of every file since this was asked last; a file may have several readers."""
    found: dict[str, dict[str, Hashed] | None] = {}
    for reader in readers:
        for path, new in reader.news().items():
            found[str(path)] = longer(found.get(str(path), {}), new)
    return found


def merging(setting: Setting) -> Work[Job, list[tuple[Piece[Job], Computed]]]:
    """The work of a merge on some pieces."""

    def work(loaded: Loaded[Job], place: Place) -> list[tuple[Piece[Job], Computed]]:
        computed = compute_all(loaded, setting, place)
        return [(piece, c) for (piece, _), c in zip(loaded, computed, strict=True)]

    return work


class Gathered:
    """What the manifest says of each tensor, gathered piece by piece."""

    def __init__(self, done: Mapping[str, TensorRecord] | None = None) -> None:
        self.done: Records = dict(done or {})
        self._parts: list[TensorRecord] = []

    def add(self, piece: Piece[Job], computed: Computed) -> None:
        self._parts.append(computed.record)
        if piece.is_last:
            self.done[piece.job.name] = whole_record(self._parts)
            self._parts = []


def check_heads(plan: Plan, experts: Sequence[Checkpoint]) -> None:
    """CheckpointError where a head is not finite: to be known before everything else is computed."""
    for label, expert, heads in zip(plan.experts, experts, plan.heads, strict=True):
        for head in heads:
            if head.spec.dtype.is_floating_point:
                check_finite(expert.read(head.spec.name), head.spec.name, f"expert {label}")


def write_heads(plan: Plan, readers: Sequence[Reader], output: Output) -> None:
    """Each expert's own heads; `readers` are those of the base and the experts."""
    if any(plan.heads):
        files.make_folder(output.path / HEADS)
    for label, reader, heads in zip(plan.experts, readers[1:], plan.heads, strict=True):
        if not heads:
            continue
        name = f"{HEADS}/{label}.safetensors"
        specs = sorted((head.spec for head in heads), key=lambda spec: -spec.dtype.itemsize)
        with TensorFiles(output.path, {name: specs}, {}) as written:
            for spec in specs:
                value = _read_whole(reader, spec.name)
                if value.dtype.is_floating_point:
                    check_finite(value, spec.name, f"expert {label}")
                written.write(name, value.to(spec.dtype))
                written.end_of_tensor([name])
            output.written |= written.finished


def _read_whole(reader: Reader, name: str) -> Tensor:
    places = reader.places([Span(name)])
    (stored,) = reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
    return stored.tensor()
