"""Batches of pieces through three stages: read ahead, compute, hand over in order. Bounded in bytes.

One thread reads each model, so that all inputs are read at once and each in its own order. Computing threads take
the batches in order: large tensors with all of torch's threads for each, medium ones side by side with one thread
each, where threads that wait for each other would cost more than they gain. The caller's thread gets the results in
order and does with them what it will, as writing them, while the next ones are read and computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.machine import give_back_freed_memory
from acemerge.checkpoints.reader import Reader, Span, Stored
from acemerge.engine.buffers import Buffers
from acemerge.engine.work import Place, Result, Work
from acemerge.linalg.device import begin_thread, with_host
from acemerge.linalg.threads import check_room, pool_of
from acemerge.planning.costs import SHARED, Cost, cost, in_flight, outside_buffers, together
from acemerge.planning.jobs import AnyJob, Input, Merge
from acemerge.planning.pieces import Load, Piece
from acemerge.shapes import Tensor

# Small tensors are read and computed together: up to so many bytes of input, up to so many pieces.
_BATCH_BYTES = 8 << 20
_BATCH_PIECES = 256
# Batches of a lane that wait, read or finished, beside those that are computed.
WAITING = 2
_SPLIT = 1 << 15  # entries for each of torch's threads
# Of what others have freed, that a large tensor leaves lying beside what it takes.
_FREED = 8 << 20
# Seconds after which memory is looked at again while a tensor is worked on: a rule leaves holes behind that it does not
# fill. To give them back costs up to a thirtieth of its time, and oftener up to twice that.
_LOOKED = 0.5


@dataclass(frozen=True)
class Batch(Generic[AnyJob]):
    """Pieces that are read, computed and handed over together."""

    pieces: tuple[Piece[AnyJob], ...]
    cost: Cost

    @property
    def load(self) -> Load:
        return self.pieces[0].load


def batches(pieces: Iterable[Piece[AnyJob]], experts: int) -> Iterator[Batch[AnyJob]]:
    """Pieces in their order, small ones together. All of a batch have the same load."""
    gathered: list[tuple[Piece[AnyJob], Cost]] = []
    nbytes = 0
    for piece in pieces:
        full = nbytes + piece.bytes_in > _BATCH_BYTES or len(gathered) == _BATCH_PIECES
        if gathered and (full or piece.load != gathered[-1][0].load):
            yield _batch(gathered)
            gathered, nbytes = [], 0
        gathered.append((piece, cost(piece, experts)))
        nbytes += piece.bytes_in
    if gathered:
        yield _batch(gathered)


def _batch(gathered: Sequence[tuple[Piece[AnyJob], Cost]]) -> Batch[AnyJob]:
    parts = tuple(piece for piece, _ in gathered)
    return Batch(parts, together(parts, [c for _, c in gathered]))


@dataclass(frozen=True)
class _Read:
    """What was read of one model for a batch, all of it in one buffer."""

    tensors: Mapping[tuple[int, str], Stored]
    buffer: Tensor


class _Kept:
    """Tensors of one model that several pieces share, the longest unused first. For its reading thread."""

    def __init__(self) -> None:
        self._tensors: dict[str, Stored] = {}

    def of(self, sizes: Mapping[str, int], limit: int, read: Callable[[str], Stored]) -> dict[str, Stored]:
        """The tensors of these names and bytes, those read that are not there. Others stay while the limit in bytes has
        room for them, too.
        """
        room = limit - sum(sizes.values())
        for name in reversed([name for name in self._tensors if name not in sizes]):  # the last used first
            room -= self._tensors[name].values.nbytes
            if room < 0:
                del self._tensors[name]
        for name in sizes:
            self._tensors[name] = self._tensors.pop(name) if name in self._tensors else read(name)
        return {name: self._tensors[name] for name in sizes}


class _Inputs:
    """What a batch reads of every model."""

    def __init__(self, reads: Mapping[int, Future[_Read]], buffers: Buffers) -> None:
        self._reads, self._buffers = dict(reads), buffers
        self._tensors: dict[int, Mapping[tuple[int, str], Stored]] = {}

    def take(self, piece: int, wanted: Input) -> Tensor:
        """A tensor of the batch's piece of this number; waits until its model was read."""
        model, name = wanted
        if model not in self._tensors:
            self._tensors[model] = self._reads[model].result().tensors
        return self._tensors[model][piece, name].tensor()

    def release(self, model: int) -> None:
        """Let go of a model's tensors: none of them may be used any more."""
        self._tensors.pop(model, None)
        read = self._reads.pop(model, None)
        if read is not None and not read.cancelled() and read.exception() is None:
            self._buffers.give(read.result().buffer)

    def release_all(self) -> None:
        for model in list(self._reads):
            self.release(model)


@dataclass(frozen=True)
class _ValuesOf:
    """The inputs of one piece of a batch. One by itself lets go of a model when it was seen."""

    number: int
    inputs: _Inputs
    alone: bool

    def take(self, wanted: Input) -> Tensor:
        return self.inputs.take(self.number, wanted)

    def release(self, model: int) -> None:
        if self.alone:
            self.inputs.release(model)


class _Lane:
    """Threads that compute batches of one kind: so many on every device, each with so many of torch's own."""

    def __init__(self, devices: Sequence[torch.device], each: int, of_torch: int) -> None:
        self.slots = each * len(devices)
        self.most = self.slots + WAITING
        self.pools = [_threads(each, f"acemerge-{device}", device, of_torch) for device in devices]


def lane_slots(workers: int) -> dict[Load, int]:
    """How many batches of a load are computed at once on a CPU.

    Tiny tensors are the interpreter's work, of which it does one thing at a time.
    """
    return {"tiny": 1, "medium": torch.get_num_threads(), "large": workers}


def threads_of(readers: int, workers: int, of_torch: int) -> int:
    """How many threads a pipeline may have: its own, and those that torch has behind each and behind the caller's."""
    lanes = 1 + of_torch + workers
    side_by_side = workers * (2 + of_torch)
    return readers + lanes + (workers + 1) * of_torch + side_by_side


class Pipeline:
    """The threads and buffers of one run; `stream` may be called several times, one after the other."""

    def __init__(self, readers: Sequence[Reader], devices: Sequence[torch.device], workers: int, limit: int) -> None:
        self._readers, self._devices, self._limit = readers, devices, limit
        self._buffers = Buffers()
        self._assigned = [0] * len(devices)
        self._kept = [_Kept() for _ in readers]
        of_torch = torch.get_num_threads()
        check_room(threads_of(len(readers), workers, of_torch))
        self._lanes: dict[Load, _Lane]
        if devices[0].type == "cpu":
            self._lanes = {
                load: _Lane(devices, slots, of_torch if load == "large" else 1)
                for load, slots in lane_slots(workers).items()
            }
        else:  # one stream per accelerator: a second thread could only wait for it
            only = _Lane(devices, 1, of_torch)
            self._lanes = {"tiny": only, "medium": only, "large": only}
        self._reading = [_threads(1, f"acemerge-read-{i}") for i in range(len(readers))]

    @property
    def experts(self) -> int:
        """How many models are read beside the base."""
        return len(self._readers) - 1

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        computing = [pool for lane in self._lanes.values() for pool in lane.pools]
        for pool in (*self._reading, *computing):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (*computing, *self._reading):
            pool.shutdown(wait=True)
        for reader in self._readers:
            reader.close()

    def of_readers(self, ask: Callable[[Reader], Result]) -> list[Result]:
        """Ask every reader, each in its own thread."""
        asked = [pool.submit(ask, reader) for pool, reader in zip(self._reading, self._readers, strict=True)]
        return [answer.result() for answer in asked]

    def stream(
        self, queue: Iterable[Piece[AnyJob]], work: Work[AnyJob, Result]
    ) -> Generator[tuple[tuple[Piece[AnyJob], ...], Result], None, None]:
        """The pieces, some together, with what `work` makes of them, in order.

        No more bytes are in flight than the limit, or than one batch takes.
        """
        pending: deque[tuple[Batch[AnyJob], Future[Result]]] = deque()
        waiting = batches(queue, self.experts)
        batch = next(waiting, None)
        while batch is not None or pending:
            while batch is not None and self._has_room([b for b, _ in pending], batch):
                pending.append((batch, self._submit(batch, work)))
                batch = next(waiting, None)
            done, future = pending.popleft()
            while not wait([future], _LOOKED).done:
                give_back_freed_memory()
            yield done.pieces, future.result()
            give_back_freed_memory()

    def _has_room(self, pending: Sequence[Batch[AnyJob]], more: Batch[AnyJob]) -> bool:
        needed = outside = 0
        for lane in set(self._lanes.values()):
            costs = [batch.cost for batch in (*pending, more) if self._lanes[batch.load] is lane]
            if len(costs) > lane.most:
                return False
            needed += in_flight(costs, lane.slots)
            outside += outside_buffers(costs, lane.slots)
        if pending and needed > self._limit:
            return False
        self._buffers.keep(self._limit - outside)
        return True

    def _submit(self, batch: Batch[AnyJob], work: Work[AnyJob, Result]) -> Future[Result]:
        wanted: dict[int, dict[tuple[int, str], Span]] = {}
        for i, piece in enumerate(batch.pieces):
            for model, name in piece.job.inputs:
                wanted.setdefault(model, {})[i, name] = Span(name, piece.rows)
        shared = _shared(batch)
        reads = {m: self._reading[m].submit(self._read, m, spans, shared.get(m, [])) for m, spans in wanted.items()}
        i = self._assigned.index(min(self._assigned))  # by bytes, not by count: tensors differ a thousandfold
        self._assigned[i] += batch.cost.working
        place = Place(self._devices[i], self._buffers)
        return self._lanes[batch.load].pools[i].submit(_compute, batch, _Inputs(reads, self._buffers), place, work)

    def _read(self, model: int, spans: Mapping[tuple[int, str], Span], shared: Sequence[TensorSpec]) -> _Read:
        """`shared` has a factor once for every piece that it is one of."""
        reader, sizes = self._readers[model], {spec.name: spec.nbytes for spec in shared}

        def whole(name: str) -> Stored:
            places = reader.places([Span(name)])
            return reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))[0]

        kept = self._kept[model].of(sizes, SHARED * sum(spec.nbytes for spec in shared), whole) if sizes else {}
        own = {key: span for key, span in spans.items() if span.name not in kept}
        places = reader.places(list(own.values()))
        buffer = self._buffers.take(places.nbytes)
        found = dict(zip(own, reader.read(places, buffer), strict=True))
        return _Read(found | {key: kept[span.name] for key, span in spans.items() if span.name in kept}, buffer)


def _shared(batch: Batch[AnyJob]) -> dict[int, list[TensorSpec]]:
    """The factors that pieces share with others, by the model that has them; one for every piece."""
    found: dict[int, list[TensorSpec]] = {}
    for job in (piece.job for piece in batch.pieces):
        for (model, _), spec in job.shared.items() if isinstance(job, Merge) else ():
            found.setdefault(model, []).append(spec)
    return found


def _compute(batch: Batch[AnyJob], inputs: _Inputs, place: Place, work: Work[AnyJob, Result]) -> Result:
    alone = len(batch.pieces) == 1
    if batch.load == "large":
        give_back_freed_memory(_FREED)
    try:
        with with_host(place.device):
            return work([(piece, _ValuesOf(i, inputs, alone)) for i, piece in enumerate(batch.pieces)], place)
    finally:
        inputs.release_all()


def _threads(count: int, name: str, device: torch.device | None = None, of_torch: int = 1) -> ThreadPoolExecutor:
    """Threads that are there already, on the CPU or each with a stream of its own on a device."""

    def begin() -> None:
        if device is not None and device.type != "cpu":
            begin_thread(device)
        elif of_torch > 1:  # the threads behind this one, while there is room: what is split over all starts them
            torch.zeros(of_torch * _SPLIT).add_(1)

    return pool_of(count, name, of_torch, begin)
