"""Counts that the parts of a merge take together: each tensor is read once for them, whoever comes, whoever dies."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import acemerge.engine.shared_counts
import acemerge.engine.thresholds
import acemerge.engine.writing
from acemerge.checkpoints import files
from acemerge.engine.execute import Progress, walker
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.engine.shared_counts import SharedCounts, shares_of
from acemerge.engine.thresholds import Counts, Halves, Pool, counting, pools_of, with_thresholds
from acemerge.errors import NumericalError, UsageError
from acemerge.output.counts import COUNTS, CountNotes, Noted, Pass
from acemerge.output.identity import digest
from acemerge.output.journal import read_identity
from acemerge.planning.parts import Part
from acemerge.recipes.recipe import make_recipe
from attacks.faulty import failing, faulty, killing, unfaulty
from attacks.merging import Case, content, in_process, snapshot

TWO_POOLS = {"rules": [{"match": "layers.0.*", "method": {"name": "ties", "keep": 0.5}}]}
NESTED = {"method": {"name": "svc", "over": {"name": "ties", "keep": 0.4}}}
SKIPPING = {"nonfinite": "skip-expert"}
# Bytes of the base and two experts: the matrices, over which the rule keeps a share, and all tensors.
POOL = 3 * (3 * 8 * 8) * 4
ALL = POOL + 3 * 8 * 4


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Three files of weights; nothing is read but for the merge itself."""
    return case_of(tmp_path)


def case_of(folder: Path, **options: Any) -> Case:
    case = Case(folder, "ties")
    case.options |= {"force": True, **options}
    case.merge(folder / "whole")
    case.expected = content(folder / "whole")
    return case


class Reads:
    """The bytes of tensors that were read since it was asked last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, self._nbytes, self._lock = files.read_runs, 0, threading.Lock()

        def read_runs(handle: files.Handle, runs: Any, path: Path) -> None:
            with self._lock:
                self._nbytes += sum(len(buffer) for _, buffers in runs for buffer in buffers)
            real(handle, runs, path)

        monkeypatch.setattr(files, "read_runs", read_runs)

    def __call__(self) -> int:
        found, self._nbytes = self._nbytes, 0
        return found


@pytest.fixture
def reads(case: Case, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """From when the case is there."""
    return Reads(monkeypatch)


# --- who counts what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_one_after_another_read_each_tensor_three_times(case: Case, reads: Reads, order: tuple[int, ...]) -> None:
    out = case.folder / "out"
    for number in order:
        case.merge(out, shard=f"{number}/3")
    assert reads() == 2 * POOL + ALL
    case.merge(out, finish=True)
    case.check_output(out)


def test_parts_that_begin_at_once_share_the_counts(case: Case, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is at its own share in both passes before any of them goes on."""
    out = case.folder / "out"
    counted, together, seen = SharedCounts._counted, threading.Barrier(3), list[int]()

    def beside(self: SharedCounts, number: int, halves: Halves | None) -> Counts:
        seen.append(number)
        together.wait(60)
        return counted(self, number, halves)

    monkeypatch.setattr(acemerge.engine.shared_counts, "_PATIENCE", 600.0)
    monkeypatch.setattr(SharedCounts, "_counted", beside)
    parts = [threading.Thread(target=case.merge, args=(out,), kwargs={"shard": f"{k}/3"}) for k in (1, 2, 3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert sorted(seen) == [1, 1, 2, 2, 3, 3]
    assert reads() == 2 * POOL + ALL
    case.merge(out, finish=True)
    case.check_output(out)


@pytest.mark.parametrize("options", [TWO_POOLS, NESTED, SKIPPING], ids=["two pools", "nested", "skip-expert"])
def test_whatever_a_recipe_has_of_such_rules(tmp_path: Path, options: dict[str, Any]) -> None:
    case = Case(tmp_path, "ties")
    if options is SKIPPING:
        file = next(path for path in case.experts[1].glob("*.safetensors") if "layers.1.weight" in load_file(path))
        tensors = load_file(file)
        tensors["layers.1.weight"][2, 3] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    case.merge(tmp_path / "whole", **options)
    case.expected = content(tmp_path / "whole")
    for number in (2, 1, 3):
        case.merge(tmp_path / "out", shard=f"{number}/3", **options)
    case.merge(tmp_path / "out", finish=True, **options)
    case.check_output(tmp_path / "out")


@given(order=st.permutations(range(1, 5)), groups=st.integers(1, 4))
def test_sums_of_shares_give_the_same_thresholds_in_any_order(counted: Any, order: list[int], groups: int) -> None:
    setting, plan, shares, whole = counted
    nested = [order[i::groups] for i in range(groups)]  # summed within themselves first

    def count(pools: list[Pool], halves: Halves | None) -> Counts:
        sums = [[shares(number, halves) for number in group] for group in nested]
        return {
            pool.number: sum(sum(part[pool.number] for part in group) for group in sums if group)  # type: ignore[misc]
            for pool in pools
        }

    assert with_thresholds(setting, plan, count).thresholds == whole  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A plan of two pools, what each of four parts counts of it, and the thresholds as one process finds them."""
    case = Case(tmp_path_factory.mktemp("counted"), "ties", layers=6, side=9)
    recipe = make_recipe(
        {"base": str(case.base), "experts": list(map(str, case.experts)), "method": "ties", **TWO_POOLS}
    )
    opened = open_recipe(recipe, None, RunOptions(max_shard_size=500))
    with opened.pipeline(1, hashing=False) as (pipeline, _):
        here = counting(opened.setting, walker(pipeline, "thresholds", lambda _: None))
        shares = shares_of(opened.layout, 4)
        assert len(shares) == 4
        assert len(pools_of(opened.plan)) == 2
        whole = with_thresholds(opened.setting, opened.plan, here).thresholds
        yield opened.setting, opened.plan, lambda number, halves: here(shares[number].pools, halves), whole


# --- who is waited for --------------------------------------------------------------------------------------


def dying(case: Case, out: Path) -> None:
    """Part 2, killed when it has counted its share and not noted it."""
    CountNotes.note = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
    case.merge(out, shard="2/3")


def test_a_part_that_was_killed_is_waited_for_and_then_done_without(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = case.folder / "out", list[Progress]()
    process = in_process(dying, case, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    waited: list[Progress] = []

    def tell(now: Progress) -> None:
        if now.name == "waiting for the counts of part 2/3":
            waited.append(now)

    monkeypatch.setattr(SharedCounts, "_patience", lambda self, number: 0.0 if waited else 600.0)
    case.merge(out, shard="1/3", on_progress=tell)
    assert [(now.stage, now.done, now.total, now.unit) for now in waited] == [("thresholds", 2, 3, "parts")]
    case.merge(out, shard="3/3", on_progress=told.append)
    case.merge(out, shard="2/3", on_progress=told.append)
    assert {now.stage for now in told} == {"merge"}
    case.merge(out, finish=True)
    case.check_output(out)


def test_of_two_that_begin_the_same_at_once_the_lower_number_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 1, which says that it counts what part 3 wants to, and then dies."""
    counted, begin, seen = SharedCounts._counted, CountNotes.begin, list[int]()

    def beside(self: CountNotes, which: Pass, share: int) -> None:
        begin(self, which, share)
        if which == "upper" and share == 3:
            begin(replace(self, part=Part(3, 1)), which, share)

    def noted(self: SharedCounts, number: int, halves: Halves | None) -> Counts:
        seen.append(number)
        return counted(self, number, halves)

    monkeypatch.setattr(CountNotes, "begin", beside)
    monkeypatch.setattr(SharedCounts, "_counted", noted)
    monkeypatch.setattr(SharedCounts, "_patience", lambda self, number: 600.0 if len(seen) < 2 else 0.0)
    case.merge(case.folder / "out", shard="3/3")
    assert seen[2:4] == [3, 3]  # the last of the first pass, the first of the second
    assert sorted(seen) == [1, 1, 2, 2, 3, 3]


def test_who_waits_can_be_interrupted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    out = case.folder / "out"
    in_process(dying, case, out).join()
    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.shared_counts, "_PATIENCE", 600.0)

        def interrupted(seconds: float) -> None:  # as by a signal, whatever handler another test has left
            raise KeyboardInterrupt

        patch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.merge(out, shard="1/3")
    monkeypatch.setattr(acemerge.engine.shared_counts, "_PATIENCE", 0.0)
    case.merge(out, resume=True)
    case.check_output(out)


@pytest.mark.parametrize(("nbytes", "seconds", "least"), [(0, 0.0, 10), (10, 0.5, 12), (10**9, 10.0, 18)])
def test_others_get_about_twice_the_time_that_a_share_takes_here(nbytes: int, seconds: float, least: float) -> None:
    """Of a gigabyte. Next to nothing says nothing of the pace."""
    given: Any = {1: SimpleNamespace(nbytes=10**9)}
    unused: Any = None
    counts = SharedCounts(unused, given, 2, unused, unused, _seconds=seconds, _nbytes=nbytes)
    assert least < counts._patience(1) < least + 4


# --- what is no count ---------------------------------------------------------------------------------------


def without_end(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return data[:-5]


def altered(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def of_another_run(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return noted(CountNotes(notes.home, notes.part, "f" * 64), note, torch.zeros(2, 1 << 15, dtype=torch.int64))


def negative(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return noted(notes, note, -torch.ones(2, 1 << 15, dtype=torch.int64))


def too_many(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return noted(notes, note, torch.full((2, 1 << 15), 1 << 62))


def of_another_shape(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return noted(notes, note, torch.zeros(2, 7, dtype=torch.int64))


def far_larger(notes: CountNotes, note: Noted, data: bytes) -> bytes:
    return noted(notes, note, torch.zeros(2, 1 << 22, dtype=torch.int64))


def noted(notes: CountNotes, note: Noted, counts: torch.Tensor) -> bytes:
    """A file as it would be with these counts, each check in it right."""
    notes.note("upper", note.share, None, [counts])
    path = notes._path("upper", note)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.mark.parametrize(
    "spoil", [without_end, altered, of_another_run, negative, too_many, of_another_shape, far_larger]
)
def test_what_is_no_count_of_this_run_is_counted_again(
    case: Case, reads: Reads, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[CountNotes, Noted, bytes], bytes]
) -> None:
    """Part 3 has noted the first pass over all shares when it ends."""
    out = case.folder / "out"
    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.thresholds, "_place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.merge(out, shard="3/3")
    assert reads() == POOL
    identity = read_identity(out / Part(3, 3).folder)
    assert identity is not None
    notes = CountNotes(out, Part(3, 3), digest(identity))
    found = [note for note in notes.look("upper") if not note.begun]
    assert len(found) == 3
    for note in found:
        path = notes._path("upper", note)
        path.write_bytes(spoil(notes, note, path.read_bytes()))
    case.merge(out, shard="1/3")
    assert reads() > 2 * POOL
    case.merge(out, resume=True)
    case.check_output(out)


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


# --- what is left of it -------------------------------------------------------------------------------------


def test_a_part_that_fails_takes_its_counts_with_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise NumericalError("tensor", "is not finite", "look at it")

    out = case.folder / "out"
    monkeypatch.setattr(acemerge.engine.writing, "compute_all", failing)
    with pytest.raises(NumericalError):
        case.merge(out, shard="2/3")
    assert snapshot(out) == {}
    assert list(out.iterdir()) == []


def test_a_part_that_starts_again_counts_again_what_it_had_counted(case: Case, reads: Reads) -> None:
    out = case.folder / "out"
    case.merge(out, shard="1/3")
    (out / COUNTS / "mine.txt").write_text("no note")
    reads()
    case.merge(out, shard="2/3", overwrite=True)
    assert reads() < ALL  # the other's counts are right
    case.merge(out, shard="1/3", overwrite=True)
    assert reads() > 2 * POOL
    case.merge(out, shard="3/3")
    (out / COUNTS / "mine.txt").unlink()
    case.merge(out, finish=True)
    case.check_output(out)


def test_no_note_is_written_through_a_link(case: Case) -> None:
    out, elsewhere = case.folder / "out", case.folder / "elsewhere"
    elsewhere.mkdir()
    for name in (".acemerge.shards", COUNTS):
        shutil.rmtree(out, ignore_errors=True)
        (out / name).parent.mkdir(parents=True)
        (out / name).symlink_to(elsewhere)
        with pytest.raises(UsageError, match=r"is a link; remove it"):
            case.merge(out, shard="1/3")
        assert list(elsewhere.iterdir()) == []


@pytest.mark.torture
@pytest.mark.parametrize("code", [errno.EIO, None], ids=["failed", "killed"])
def test_a_part_that_ends_at_whichever_call_leaves_what_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    monkeypatch.setattr(acemerge.engine.shared_counts, "_PATIENCE", 0.0)
    with faulty(-1, unfaulty) as calls:
        case.merge(case.folder / "counted", shard="1/3")
    for k in range(1, calls.count, 13):
        out = case.folder / f"at-{k}"
        process = in_process(broken, case, out, k, code)
        process.join()
        assert process.exitcode in (0, 3, 5) if code else process.exitcode == -signal.SIGKILL
        for number in (2, 1, 3):
            case.merge(out, shard=f"{number}/3")
        case.merge(out, finish=True)
        case.check_output(out)
        shutil.rmtree(out)


def broken(case: Case, out: Path, k: int, code: int | None) -> None:
    with faulty(k, failing(code) if code else killing):
        case.merge(out, shard="1/3")
