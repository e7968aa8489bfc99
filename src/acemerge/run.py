"""Executes a plan: reads and computes ahead in worker threads, writes in order, publishes at the end."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.masks import mask_spec
from acemerge.checkpoints.writer import HEADS, MASKS, FileSum, OutputFolder, split_shards
from acemerge.compute import Computed, Inputs, check_finite, compute
from acemerge.plan import Job, Plan
from acemerge.shapes import Tensor


@dataclass(frozen=True)
class Progress:
    """One finished tensor, for whoever shows progress."""

    name: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int


OnProgress = Callable[[Progress], None]


def computed_in_order(
    jobs: Sequence[Job], inputs: Inputs, workers: int, on_progress: OnProgress
) -> Generator[tuple[Job, Computed], None, None]:
    """Every job's result in the order of `jobs`; at most `workers + 1` tensors are in flight.

    Each job is computed by one thread from its own inputs, so the result does not depend on `workers`.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="acemerge")
    total = sum(job.spec.nbytes for job in jobs)
    finished = bytes_done = 0
    try:
        pending: deque[tuple[Job, Future[Computed]]] = deque()
        waiting = iter(jobs)
        while True:
            while len(pending) <= workers and (job := next(waiting, None)) is not None:
                pending.append((job, pool.submit(compute, job, inputs)))
            if not pending:
                return
            job, future = pending.popleft()
            result = future.result()
            finished, bytes_done = finished + 1, bytes_done + job.spec.nbytes
            yield job, result
            on_progress(Progress(job.name, finished, len(jobs), bytes_done, total))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_model(
    plan: Plan, inputs: Inputs, output: OutputFolder, max_shard: int, workers: int, on_progress: OnProgress
) -> dict[str, Mapping[str, Any]]:
    """Write all weights of the plan to `output` and return what the manifest says of each tensor."""
    shards = split_shards([job.spec for job in plan.jobs], max_shard)
    by_name = {job.name: job for job in plan.jobs}
    ordered = [by_name[spec.name] for _, specs in shards for spec in specs]
    records: dict[str, Mapping[str, Any]] = {}
    results = computed_in_order(ordered, inputs, workers, on_progress)

    def next_tensor(name: str) -> Tensor:
        job, result = next(results)
        assert job.name == name
        records[name] = result.record
        write_masks(result)
        return result.value

    try:
        with _mask_files(plan, ordered, output) as write_masks:
            for file, specs in shards:
                output.write_tensors(file, specs, next_tensor)
            next(results, None)  # reports the last tensor
    finally:
        results.close()
    output.write_index(shards)
    _write_heads(plan, inputs, output)
    return {name: records[name] for name in by_name}


@contextlib.contextmanager
def _mask_files(plan: Plan, ordered: Sequence[Job], output: OutputFolder) -> Iterator[Callable[[Computed], None]]:
    """One file of masks per expert, written along with the model, where a rule of the plan makes masks."""
    specs = [mask_spec(job.spec) for job in ordered if job.method and job.method.needs.masks]
    with contextlib.ExitStack() as files_open:
        if specs:
            files.make_folder(output.path / MASKS)
        names = [f"{MASKS}/{label}.safetensors" for label in plan.experts] if specs else []
        writers = [files_open.enter_context(output.tensor_stream(name, specs)) for name in names]

        def write(result: Computed) -> None:
            if result.masks:
                for writer, mask in zip(writers, result.masks, strict=True):
                    writer(mask)

        yield write


def _write_heads(plan: Plan, inputs: Inputs, output: OutputFolder) -> None:
    for label, expert, heads in zip(plan.experts, inputs.experts, plan.heads, strict=True):
        if not heads:
            continue
        files.make_folder(output.path / HEADS)
        specs: list[TensorSpec] = sorted((head.spec for head in heads), key=lambda spec: -spec.dtype.itemsize)

        def read(name: str, expert: Any = expert, label: str = label) -> Tensor:
            value: Tensor = expert.read(name)
            if value.dtype.is_floating_point:
                check_finite(value, name, f"expert {label}")
            return value

        output.write_tensors(f"{HEADS}/{label}.safetensors", specs, read)


@contextlib.contextmanager
def hashing(checkpoints: Sequence[Checkpoint]) -> Iterator[Callable[[], list[dict[str, FileSum]]]]:
    """Hash every weight file in a thread of its own; the yielded function waits for the sums."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="acemerge-hash")
    paths = dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.weight_files)
    futures = {path: pool.submit(_file_sum, path) for path in paths}
    try:
        yield lambda: [{p.name: futures[p].result() for p in c.weight_files} for c in checkpoints]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _file_sum(path: Path) -> FileSum:
    return FileSum(files.sha256(path), files.fingerprint(path)[0])
