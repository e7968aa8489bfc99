"""The weights of outputs, written as they are computed: of one, or of several that are made of the same models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from acemerge.checkpoints import files
from acemerge.checkpoints.reader import Reader
from acemerge.engine.batched import compute_all
from acemerge.engine.compute import Computed, compute
from acemerge.engine.execute import Gathered, Layout, Records, read_by
from acemerge.engine.work import Loaded, Place, Setting, Values, Walk, Work
from acemerge.output.journal import Done, Journal, Step
from acemerge.output.protocol import Output
from acemerge.output.writer import TensorFiles
from acemerge.planning.jobs import Input, Job
from acemerge.planning.pieces import Piece, common_pieces
from acemerge.shapes import Tensor

Results = list[tuple[Piece[Job], Computed]]


@dataclass(frozen=True)
class Target:
    """An output, and what its weights are made of and noted in."""

    layout: Layout
    setting: Setting
    output: Output
    done: Done
    journal: Journal


class Writing:
    """The weights of one output, as they come. What is done of them already is not waited for."""

    def __init__(self, target: Target, readers: Sequence[Reader]) -> None:
        self._to, self._readers, layout = target, readers, target.layout
        self._records = Gathered({step.tensor: step.record for step in target.done.steps})
        self.every = layout.jobs
        self.waiting = [job for job in self.every if job.name not in self._records.done]
        for folder in {(target.output.path / name).parent for name in layout.files}:
            files.make_folder(folder)
        self._weights = TensorFiles(target.output.path, layout.files, target.done.begun, layout.steps)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.__exit__()

    def add(self, results: Iterable[tuple[Piece[Job], Computed]]) -> None:
        """Write what was computed, in the order of the layout."""
        steps, layout = [], self._to.layout
        for piece, computed in results:
            goes_to = layout.goes_to[piece.job.name]
            for file, value in zip(goes_to, (*computed.stored, *computed.masks), strict=True):
                self._weights.write(file, value)
            self._records.add(piece, computed)
            if piece.is_last:
                sums = self._weights.end_of_tensor(dict.fromkeys(goes_to))
                steps.append(Step(piece.job.name, self._records.done[piece.job.name], sums))
        if steps:
            self._to.journal.have_read(read_by(self._readers))
        self._to.journal.add(steps)
        self._to.output.complete(steps, self._weights.finished)

    def finish(self) -> Records:
        """What the manifest says of each tensor, when all were added."""
        self._to.output.written |= self._weights.finished
        layout, done = self._to.layout, self._records.done
        written = {job.name for job in layout.jobs}
        return {job.name: done[job.name] for job in layout.plan.jobs if job.name in written}


def write_weights(targets: Sequence[Target], walk: Walk, readers: Sequence[Reader]) -> list[Records]:
    """Write all weights that are not done yet, and return what each manifest says of its tensors.

    What several outputs are made of is read once. Each gets the bytes that it would get alone.
    """
    with contextlib.ExitStack() as stack:
        writings = [stack.enter_context(Writing(target, readers)) for target in targets]
        for results in walk(_pieces(writings), _merging(targets)):
            for writing, own in zip(writings, results, strict=True):
                if own:
                    writing.add(own)
        return [writing.finish() for writing in writings]


def _pieces(writings: Sequence[Writing]) -> Iterator[Piece[Job]]:
    """What the outputs wait for, tensor by tensor: their layouts have the same order."""
    wanted: dict[str, list[Job]] = {job.name: [] for writing in writings for job in writing.every}
    for job in (job for writing in writings for job in writing.waiting):
        wanted[job.name].append(job)
    for jobs in wanted.values():
        yield from common_pieces(jobs)


def _merging(targets: Sequence[Target]) -> Work[Job, list[Results]]:
    """The work of a merge on some pieces: what each output gets of them."""
    owners = {id(job): i for i, target in enumerate(targets) for job in target.layout.plan.jobs}

    def work(loaded: Loaded[Job], place: Place) -> list[Results]:
        found: list[dict[int, tuple[Piece[Job], Computed]]] = [{} for _ in targets]
        apart: list[dict[int, tuple[Piece[Job], Values]]] = [{} for _ in targets]
        for i, (piece, values) in enumerate(loaded):
            if not piece.beside or piece.load == "tiny":  # for stacks of each rule's own
                for own in piece.each:
                    apart[owners[id(own.job)]][i] = own, _Held(values) if piece.beside else values
                continue
            with place.in_common() as common:
                for own in piece.each:
                    owner = owners[id(own.job)]
                    found[owner][i] = own, compute(own, _Held(values), targets[owner].setting, common)
        for target, share, done in zip(targets, apart, found, strict=True):
            computed = compute_all(list(share.values()), target.setting, place)
            done |= {i: (share[i][0], c) for i, c in zip(share, computed, strict=True)}
        return [[done[i] for i in sorted(done)] for done in found]

    return work


@dataclass(frozen=True)
class _Held:
    """Inputs that another job wants, too: none is let go of."""

    values: Values

    def take(self, wanted: Input) -> Tensor:
        return self.values.take(wanted)

    def release(self, model: int) -> None:
        pass
