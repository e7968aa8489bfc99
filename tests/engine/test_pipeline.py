"""The pipeline: order, memory in flight, buffers used again, devices by bytes, and pieces that make a whole."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint, write_sharded
from conformance import DATA_FREE
from hashes import stored_hashes
from hypothesis import given
from hypothesis import strategies as st

import acemerge
import acemerge.engine.opening
import acemerge.engine.pipeline
import acemerge.planning.pieces
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.hashes import check_unchanged
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.reader import Reader, Span
from acemerge.engine.buffers import Buffers
from acemerge.engine.opening import open_recipe
from acemerge.engine.pipeline import Pipeline
from acemerge.engine.run_options import RunOptions
from acemerge.engine.work import Loaded, Place
from acemerge.errors import CheckpointError, UsageError
from acemerge.methods import make
from acemerge.models.roles import Role
from acemerge.planning.costs import Cost, budget, cost, in_flight, peak_memory, resident, together
from acemerge.planning.jobs import Keep
from acemerge.planning.pieces import Piece, pieces
from acemerge.recipes.recipe import make_recipe

CPU = torch.device("cpu")


def _jobs(path: Path, count: int = 12, side: int = 16) -> tuple[list[Reader], list[Piece[Keep]]]:
    """Two models of `count` square tensors, and a job for each."""
    generator = torch.Generator().manual_seed(0)
    folders = [
        write_checkpoint(
            path / f"m{i}", {f"t{j:02d}": torch.randn(side, side, generator=generator) for j in range(count)}
        )
        for i in range(2)
    ]
    readers = [Reader(open_checkpoint(folder), hashing=True) for folder in folders]
    role = Role("linear")
    specs = list(readers[0].checkpoint.tensors.values())
    jobs = [Keep(spec, role, "", (spec.name,), bytes_in=2 * spec.nbytes) for spec in specs]
    return readers, [Piece(job) for job in jobs]


def _sums(loaded: Loaded[Keep], place: Place) -> list[float]:
    return [(v.take((0, p.job.name)).sum() + v.take((1, p.job.name)).sum()).item() for p, v in loaded]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_results_come_in_order_whatever_the_workers_and_the_limit(tmp_path: Path, workers: int, limit: int) -> None:
    readers, queue = _jobs(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 2)
        with Pipeline(readers, [CPU], workers, limit) as pipeline:
            found = list(pipeline.stream(queue, _sums))
    assert [piece for batch, _ in found for piece in batch] == queue
    models = [load_folder(tmp_path / "m0"), load_folder(tmp_path / "m1")]
    expected = [(models[0][p.job.name].sum() + models[1][p.job.name].sum()).item() for p in queue]
    assert [value for _, values in found for value in values] == expected


@pytest.mark.usefixtures("two_threads")
def test_each_load_has_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pieces get all of torch's threads, `workers` at a time; medium ones one each; tiny ones wait in line."""
    readers, queue = _jobs(tmp_path)
    loads = ["large", "medium", "tiny", "medium"] * 3
    for piece, load in zip(queue, loads, strict=True):
        piece.__dict__["load"] = load  # of a frozen dataclass
    monkeypatch.setattr(Piece, "load", property(lambda piece: piece.__dict__["load"]))
    before = torch.get_num_threads()

    def threads(loaded: Loaded[Keep], place: Place) -> tuple[str, int, int]:
        torch.ones(1 << 17).sum()  # a thread's first work on several threads
        return loaded[0][0].load, torch.get_num_threads(), threading.get_ident()

    with Pipeline(readers, [CPU], 2, 1 << 30) as pipeline:
        found = list(pipeline.stream(queue, threads))
    assert [piece for batch, _ in found for piece in batch] == queue
    seen = {load: [(n, who) for at, n, who in (result for _, result in found) if at == load] for load in set(loads)}
    assert {n for n, _ in seen["large"]} == {before}
    assert {n for n, _ in seen["medium"]} == {n for n, _ in seen["tiny"]} == {1}
    assert len({who for _, who in seen["tiny"]}) == 1
    after: list[int] = []
    later = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *after] == [before, before]


def test_no_more_is_in_flight_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, queue = _jobs(tmp_path)
    monkeypatch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
    submitted: list[str] = []
    with Pipeline(readers, [CPU], 2, cost(queue[0], 1).working) as pipeline:
        submit = pipeline._submit
        monkeypatch.setattr(pipeline, "_submit", lambda b, w: submitted.append(b.pieces[0].job.name) or submit(b, w))
        for i, _ in enumerate(pipeline.stream(queue, _sums), 1):
            assert len(submitted) == i  # the next one waits until this one is dealt with


def test_a_failure_in_any_stage_ends_the_stream(tmp_path: Path) -> None:
    readers, queue = _jobs(tmp_path)
    before = set(threading.enumerate())

    def failing(loaded: Loaded[Keep], place: Place) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Pipeline(readers, [CPU], 2, 1 << 30) as pipeline:
        list(pipeline.stream(queue, failing))
    (tmp_path / "m1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="too early"), Pipeline(readers, [CPU], 2, 1 << 30) as pipeline:
        list(pipeline.stream(queue, _sums))
    assert not set(threading.enumerate()) - before


def test_devices_share_the_bytes_not_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor on one device, the small ones on the other until they weigh as much."""
    readers, queue = _jobs(tmp_path)
    monkeypatch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
    large = replace(queue[0], job=replace(queue[0].job, bytes_in=5 * queue[0].job.bytes_in))
    devices = [CPU, torch.device("cpu", 0)]
    with Pipeline(readers, devices, 1, 1 << 30) as pipeline:
        used = [place for _, place in pipeline.stream([large, *queue[1:]], lambda _, place: place.device)]
    assert used[:5] == [devices[0], *[devices[1]] * 4]
    assert devices[0] in used[5:]


# --- memory ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 100)] * 3), min_size=1, max_size=6), st.integers(1, 3))
def test_bytes_in_flight_are_those_of_the_worst_moment(sizes: list[tuple[int, int, int]], workers: int) -> None:
    costs = [Cost(waiting, waiting + more, written) for waiting, more, written in sizes]
    moments = []
    for first in range(len(costs)):  # those before are finished, `workers` are computed, the rest is read
        stages = ["written"] * first + ["working"] * workers + ["waiting"] * len(costs)
        moments.append(sum(getattr(c, stage) for c, stage in zip(costs, stages, strict=False)))
    assert in_flight(costs, workers) == max(moments)


@pytest.mark.parametrize(("side", "at_once"), [(362, 1), (256, 2), (16, 2)])
def test_pieces_together_take_their_inputs_and_the_computation_of_a_stack(side: int, at_once: int) -> None:
    """Two pieces of two models each, of which so many make a stack."""
    piece = Piece(Keep(TensorSpec("w", torch.float32, (side, side)), Role("linear"), "", ("w",)))
    assert together([piece, piece], [Cost(10, 50, 5), Cost(20, 30, 4)]) == Cost(30, 30 + 9 + at_once * 35, 9, 30)


def test_large_buffers_are_used_again_for_what_is_not_much_smaller() -> None:
    buffers, MB = Buffers(), 1 << 20
    buffers.keep(10 * MB)
    first = buffers.take(5 * MB)
    buffers.give(first)
    assert buffers.take(4 * MB) is first
    buffers.give(first)
    assert buffers.take(2 * MB) is not first
    assert len(buffers.take(5 * MB + 1)) == 5 * MB + 1
    buffers.keep(5 * MB - 1)
    assert buffers.take(5 * MB) is not first


def test_idle_buffers_have_the_room_that_those_in_use_leave() -> None:
    buffers, MB = Buffers(), 1 << 20
    buffers.keep(10 * MB)
    first, _ = buffers.take(4 * MB), buffers.take(6 * MB)
    buffers.give(first)
    assert buffers.take(4 * MB) is first
    buffers.give(first)
    buffers.take(5 * MB)  # of which there is no room left for an idle one
    assert buffers.take(4 * MB) is not first


def test_a_stream_of_pieces_works_in_the_same_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh one costs more than the work that is done in it. With room for all, there are no more than are in use at
    once: those of three pieces, of which two wait, and one to work in for each.
    """
    made: list[int] = []
    monkeypatch.setattr(acemerge.engine.opening, "allowed", lambda *_: 1 << 30)
    fresh = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: made.append(a[1]) or fresh(*a, **k))
    monkeypatch.setattr(acemerge.planning.pieces, "_PIECE", 1 << 21)
    W = torch.randn(1 << 14, 1 << 10)
    folders = [write_checkpoint(tmp_path / f"m{i}", {"layers.0.weight": W * (1 + i / 100)}) for i in range(3)]
    acemerge.merge(folders[0], folders[1:], method="average")  # 24 pieces
    usual = made.count(max(set(made), key=made.count))
    assert 0 < usual <= 3 * (len(folders) + 1)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux")
def test_what_is_read_once_does_not_fill_the_systems_cache(tmp_path: Path) -> None:
    """In pieces that begin and end within the blocks that the system forgets as a whole."""
    name, rows = "weight", 64
    folder = write_checkpoint(tmp_path / "m", {name: torch.ones(rows, 1 << 18)})  # 64 MB
    descriptor = os.open(folder / "model.safetensors", os.O_RDONLY)

    def cached() -> int:
        count = 0
        for offset in range(0, rows << 20, 1 << 20):
            with contextlib.suppress(BlockingIOError):
                count += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        return count

    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached():
        pytest.skip("this file system keeps everything")
    reader = Reader(open_checkpoint(folder), cached=False)
    for first in range(rows):
        places = reader.places([Span(name, (first, first + 1))])
        reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
    reader.close()
    assert cached() < rows / 4
    os.close(descriptor)


def test_a_value_never_lies_in_a_buffer_that_serves_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert, nothing changed, float32: every shortcut of every rule leads back to an input."""
    plain = PlainModel(tmp_path, experts=1)
    base, experts = plain.save()
    settings = [(method, models) for method in DATA_FREE for models in (experts, [base])]
    for i, (method, models) in enumerate(settings):
        acemerge.merge(base, models, method=method, out=tmp_path / f"{i}")
    monkeypatch.setattr(Buffers, "give", lambda self, buffer: buffer.fill_(0xFF))
    for i, (method, models) in enumerate(settings):
        acemerge.merge(base, models, method=method, out=tmp_path / "out", overwrite=True)
        before, after = load_folder(tmp_path / f"{i}"), load_folder(tmp_path / "out")
        assert all(torch.equal(after[name], value) for name, value in before.items()), method


# --- pieces and spans ------------------------------------------------------------------------------------------


ENTRYWISE = [name for name in acemerge.METHODS if make(name, {}).needs.entrywise]


@pytest.mark.parametrize("method", [*ENTRYWISE, "ties"])  # ties: its thresholds are counted in pieces
def test_a_tensor_in_pieces_is_the_same_tensor(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PlainModel(tmp_path)
    plain.tuned[0]["layers.0.up.weight"] = plain.base["layers.0.up.weight"]  # one expert's zero among them
    base, experts = plain.save()
    experts = experts[: make(method, {}).needs.most_experts]
    whole = acemerge.merge(base, experts, out=tmp_path / "whole", method=method)
    monkeypatch.setattr(acemerge.planning.pieces, "_PIECE", 30)
    split = acemerge.merge(base, experts, out=tmp_path / "split", method=method)
    for name, value in load_folder(tmp_path / "whole").items():
        torch.testing.assert_close(load_folder(tmp_path / "split")[name], value, rtol=1e-6, atol=1e-7)
        one, other = whole.tensors[name], split.tensors[name]
        summed = ("seconds", "energies", "base_energy", "merged_energy")
        assert {k: v for k, v in one.items() if k not in summed} == {k: v for k, v in other.items() if k not in summed}
        for key in ("energies", "base_energy", "merged_energy"):
            assert one.get(key, []) == pytest.approx(other.get(key, []), rel=1e-6)


def test_the_place_of_a_value_is_told_in_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PlainModel(tmp_path)
    plain.tuned[1]["embed_tokens.weight"][9, 2] = float("nan")
    base, experts = plain.save()
    monkeypatch.setattr(acemerge.planning.pieces, "_PIECE", 30)
    with pytest.raises(CheckpointError, match=r"is nan at \[9, 2\]"):
        acemerge.merge(base, experts)


@given(st.lists(st.integers(1, 40), min_size=0, max_size=3), st.integers(1, 200))
def test_pieces_cover_a_tensor_once(shape: list[int], size: int) -> None:
    job = Keep(TensorSpec("t", torch.float32, tuple(shape)), Role("linear"), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.planning.pieces, "_PIECE", size)
        parts = list(pieces(job, split=True))
    assert sum(part.count for part in parts) == job.spec.count
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    if len(parts) > 1:
        assert [part.rows[0] for part in parts[1:]] == [part.rows[1] for part in parts[:-1]]
        row = job.spec.count // shape[0]
        assert all(part.count <= max(size, row) for part in parts)


def test_spans_are_read_and_their_tensors_are_hashed_whole(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(60.0).reshape(12, 5) + i for i in range(4)} | {
        "h": torch.ones(3, dtype=torch.int8)
    }
    folder = write_sharded(tmp_path, [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])])
    for wanted in (["t0", "t1", "t2", "t3", "h"], ["t3", "t1"], ["t2", "t0", "t2"], []):
        reader = Reader(open_checkpoint(folder), hashing=True)
        spans = [Span(name, (2, 7)) for name in wanted if name != "h"] + [Span("h")] * ("h" in wanted)
        places = reader.places(spans)
        found = reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
        for span, stored in zip(spans, found, strict=True):
            assert torch.equal(stored.tensor(), tensors[span.name][slice(*span.rows) if span.rows else slice(None)])
        for path, read in reader.hashes().items():
            assert {name: part.sha256 for name, part in read.tensors.items()}.items() <= stored_hashes(path).items()
        assert {name for read in reader.hashes().values() for name in read.tensors} == set(wanted)
        reader.close()


def test_an_input_that_was_only_touched_is_unchanged(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"a": torch.zeros(4), "b": torch.ones(4)})
    path = folder / "model.safetensors"
    for change, refused in ((path.touch, False), (lambda: _flip_last_bit(path), True)):
        reader = Reader(open_checkpoint(folder), hashing=True)
        places = reader.places([Span("a"), Span("b")])
        reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
        hashes = reader.hashes()
        change()
        if refused:
            with pytest.raises(CheckpointError, match="changed during the run"):
                check_unchanged(reader.checkpoint, hashes)
        else:
            check_unchanged(reader.checkpoint, hashes)


def _flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# --- the limit on memory ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_its_name(tmp_path: Path) -> None:
    plain = PlainModel(tmp_path)
    plain.base["layers.0.wide.weight"] = torch.zeros(64, 300)
    plain.tuned = [expert | {"layers.0.wide.weight": torch.ones(64, 300)} for expert in plain.tuned]
    base, experts = plain.save()
    recipe = make_recipe({"base": str(base), "experts": [str(expert) for expert in experts]})
    always = resident(open_recipe(recipe, None, RunOptions()).plan)
    message = (
        r"--max-memory: tensor 'layers.0.wide.weight' by kron_auto needs 3\d\d,\d\d\d,\d\d\d bytes, "
        f"more than {always:,}"
    )
    with pytest.raises(UsageError, match=message):
        acemerge.merge(base, experts, out=tmp_path / "out", max_memory=f"{always}B")
    assert not (tmp_path / "out").exists()
    rules = [{"match": "*.wide.*", "action": "base"}]
    acemerge.merge(base, experts, out=tmp_path / "out", max_memory=f"{always + 1_000_000}B", rules=rules)


def test_the_budget_is_the_promise_or_what_the_user_says(tmp_path: Path) -> None:
    base, experts = PlainModel(tmp_path).save()
    recipe = make_recipe({"base": str(base), "experts": [str(expert) for expert in experts]})
    plan = open_recipe(recipe, None, RunOptions()).plan
    always = resident(plan)
    assert budget(plan, None) == (3 + 4) * 4 * 11 * 6 + 500_000_000 - always
    assert budget(plan, 10**9) == 10**9 - always
    assert always < peak_memory(plan) < always + budget(plan, None)
    wide = open_recipe(make_recipe({**recipe.model_dump(), "compute_dtype": "float64"}), None, RunOptions()).plan
    assert peak_memory(wide) > peak_memory(plan)
    assert budget(wide, None) == (3 + 4) * 8 * 11 * 6 + 500_000_000 - resident(wide)
