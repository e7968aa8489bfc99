"""A merge in parts: the bytes of one that is whole, in any order, or one line that says why not."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import acemerge.api
import acemerge.engine.execute
import acemerge.engine.writing
import acemerge.output.identity
from acemerge.checkpoints import locks
from acemerge.engine.execute import Progress
from acemerge.errors import AcemergeError, CheckpointError, NumericalError, UsageError, WriteError
from acemerge.output.verify import verify
from acemerge.planning.parts import Part, parse_part, spread
from attacks.faulty import failing, faulty, killing, unfaulty
from attacks.merging import Case, in_process, snapshot

PARTIAL = ".acemerge.partial"
_PROCESSOR = acemerge.output.identity._processor()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Three files of weights."""
    return Case(tmp_path, "average")


@pytest.fixture
def out(case: Case) -> Path:
    """All three parts, not put together yet."""
    return in_parts(case, case.folder / "out", 1, 2, 3)


def in_parts(case: Case, out: Path, *numbers: int, **options: Any) -> Path:
    for number in numbers:
        case.merge(out, shard=f"{number}/3", **options)
    return out


def run_of(folder: Path) -> str:
    run: str = json.loads((folder / "acemerge.json").read_text())["run"]
    return run


def refused(case: Case, out: Path, *words: str, of: type[AcemergeError] = UsageError, **options: Any) -> None:
    """The merge fails with one line that has all the words, and leaves everything as it was."""
    before = snapshot(out)
    with pytest.raises(of) as failure:
        case.merge(out, **options)
    assert all(word in str(failure.value) for word in words), str(failure.value)
    assert "\n" not in str(failure.value)
    assert snapshot(out) == before


@pytest.mark.parametrize("method", ["ace", "average", "ties", "dare_ties", "emr"])
def test_parts_in_processes_of_their_own_give_the_same_files_and_manifest(tmp_path: Path, method: str) -> None:
    case, out = Case(tmp_path, method), tmp_path / "out"
    processes = [in_process(in_parts, case, out, number) for number in (2, 3, 1)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not (out / "acemerge.json").exists()
    assert not list(out.rglob("*.safetensors"))
    case.merge(out, finish=True)
    case.check_output(out)
    verify(out)
    assert run_of(out) == run_of(tmp_path / "reference")
    assert (out / "heads/one.safetensors").exists()


def test_a_part_reports_of_its_own_tensors_and_files(case: Case) -> None:
    reports = [case.merge(case.folder / "out", shard=f"{number}/3") for number in (3, 1, 2)]
    assert [report.part for report in reports] == ["3/3", "1/3", "2/3"]
    tensors = [name for report in reports for name in report.tensors]
    written = [name for report in reports for name in report.manifest["outputs"]]
    assert sorted(tensors) == sorted(case.expected["acemerge.json"]["tensors"])
    assert sorted(written) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_part_that_is_done_is_not_done_again(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: data for name, data in snapshot(out).items() if name.endswith(PARTIAL)}
    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.writing, "compute_all", None)
        assert case.merge(out, shard="2/3").was_complete
    assert not case.merge(out, shard="2/3", overwrite=True).was_complete
    assert {name: data for name, data in snapshot(out).items() if name.endswith(PARTIAL)} == before
    case.merge(out, finish=True)
    case.check_output(out)


def test_a_killed_part_goes_on(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, done = case.folder / "out", acemerge.engine.writing.TensorFiles.end_of_tensor, 0

    def end_of_tensor(self: Any, names: list[str]) -> Any:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt
        return real(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.writing.TensorFiles, "end_of_tensor", end_of_tensor)
        with pytest.raises(KeyboardInterrupt):
            case.merge(out, shard="1/2")
    case.merge(out, shard="2/2")
    refused(case, out, "part 1/2 is not finished", "--shard 1/2", finish=True)
    case.merge(out, shard="1/2")
    case.merge(out, finish=True)
    case.check_output(out)


@pytest.mark.parametrize("numbers", [(2,), (1, 2, 3)])
def test_one_process_goes_on_with_parts_and_finishes_them(
    tmp_path: Path, numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds that a part has found are not looked for again."""
    case, told = Case(tmp_path, "ties"), list[Progress]()
    out = in_parts(case, tmp_path / "out", *numbers)
    monkeypatch.setattr(acemerge.engine.execute, "with_thresholds", None)
    report = case.merge(out, resume=True, on_progress=told.append)
    case.check_output(out)
    assert run_of(out) == run_of(tmp_path / "reference")
    assert (report.part, told[-1].done, told[-1].share) == (None, told[-1].total, pytest.approx(1))
    assert case.merge(out, resume=True).was_complete


def test_one_process_does_not_go_on_with_parts_of_another_run(case: Case) -> None:
    out = in_parts(case, case.folder / "out", 1, 3)
    refused(case, out, "in part 1/3 recipe scale is", "in part 3/3 recipe scale is", scale=0.5, resume=True)


def test_parts_replace_an_earlier_output_when_all_are_done(case: Case) -> None:
    out = case.folder / "out"
    earlier = case.merge_earlier(out)
    refused(case, out, "holds a finished merge", shard="1/3")
    in_parts(case, out, 1, 2, 3, overwrite=True)
    assert {name: data for name, data in snapshot(out).items() if name in earlier} == earlier
    refused(case, out, "holds a finished merge", finish=True)
    case.merge(out, finish=True, overwrite=True)
    case.check_output(out)


@pytest.mark.parametrize("code", [errno.EIO, None], ids=["failed", "killed"])
def test_a_finish_that_was_broken_off_is_run_again(tmp_path: Path, code: int | None) -> None:
    """At whichever call to the system: what the parts have done stays until the whole is published."""
    case, parts = Case(tmp_path, "emr"), tmp_path / "parts"
    case.merge_earlier(parts)
    in_parts(case, parts, 1, 2, 3, overwrite=True)
    with faulty(-1, unfaulty) as calls:
        case.merge(shutil.copytree(parts, tmp_path / "counted"), finish=True, overwrite=True)
    for k in range(calls.count // 5, calls.count, calls.count // 5):
        out = shutil.copytree(parts, tmp_path / f"at-{k}")
        process = in_process(broken_finish, case, out, k, code)
        process.join()
        assert process.exitcode in (0, 3, 5) if code else process.exitcode == -signal.SIGKILL
        published = run_of(out) == run_of(tmp_path / "reference") if (out / "acemerge.json").exists() else False
        case.merge(out, **({"resume": True} if published else {"finish": True, "overwrite": True}))
        case.check_output(out)


def broken_finish(case: Case, out: Path, k: int, code: int | None) -> None:
    with faulty(k, failing(code) if code else killing):
        case.merge(out, finish=True, overwrite=True)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["4/3", "0/3", "x", "1/0", "-1/3", "1/3/5", "2", "", "1 / 3", "²/3", "9999999/9999999"]
)
def test_what_is_no_part_is_refused(case: Case, shard: str) -> None:
    refused(case, case.folder / "out", f"--shard: {shard!r} is no part of a merge; write K/N", shard=shard)


def test_more_parts_than_files_are_refused(case: Case) -> None:
    refused(case, case.folder / "out", "--shard 2/4", "3 files", "use fewer parts", shard="2/4")
    assert not (case.folder / "out").exists()


@pytest.mark.parametrize("name", ["finish", "push", "report"])
def test_what_only_the_whole_has_is_refused_to_a_part(case: Case, name: str) -> None:
    value = "org/name" if name == "push" else True
    refused(case, case.folder / "out", f"a part has no use for --{name}", shard="2/3", **{name: value})


@pytest.mark.parametrize("how", [{"shard": "1/2"}, {"finish": True}])
def test_an_adapter_and_rules_with_calibration_are_refused_by_name(case: Case, how: dict[str, Any]) -> None:
    refused(case, case.folder / "out", "--as-lora", "leave out", as_lora=2, **how)
    measured = {"method": "fisher", "calibration": case.folder / "tasks.yaml"}
    refused(case, case.folder / "out", "fisher measures the experts on data", **measured, **how)


def test_without_an_output_there_are_no_parts(case: Case) -> None:
    with pytest.raises(UsageError, match="there is no output for parts to write to"):
        acemerge.merge(case.base, case.experts, shard="1/2")


def test_missing_parts_are_named(case: Case) -> None:
    out = case.folder / "out"
    refused(case, out, "holds no part of a merge", finish=True)
    in_parts(case, out, 2)
    refused(case, out, "parts 1/3, 3/3 are missing", "--shard 1/3", finish=True)
    in_parts(case, out, 1)
    refused(case, out, "part 3/3 is missing", finish=True)


def of_two_threads(_: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.set_num_threads(2)
    return {}


def of_another_processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(acemerge.output.identity, "_processor", lambda: {**_PROCESSOR, "capability": "OTHER"})
    return {}


def of_another_recipe(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"scale": 0.5}


OTHER = {
    "recipe scale": of_another_recipe,
    "processor capability": of_another_processor,
    "threads": of_two_threads,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("what", "change"), OTHER.items())
def test_parts_of_another_run_are_named_with_what_differs(
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    change: Callable[[pytest.MonkeyPatch], dict[str, Any]],
) -> None:
    case = Case(tmp_path, "average")
    out = in_parts(case, tmp_path / "out", 1, 3)
    with monkeypatch.context() as patch:
        changed = change(patch)
        refused(case, out, f"in part 1/3 {what} is", f"in part 3/3 {what} is", shard="2/3", **changed)
        in_parts(case, out, 2, overwrite=True, **changed)
    torch.set_num_threads(1)
    refused(case, out, "its parts are not all of this run", f"in part 2/3 {what} is", finish=True)
    in_parts(case, out, 2, overwrite=True)
    case.merge(out, finish=True)
    case.check_output(out)


def test_another_machine_may_put_parts_together(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another_processor(monkeypatch)
    case.merge(out, finish=True)
    case.check_output(out)
    assert run_of(out) == run_of(case.folder / "reference")


def test_what_an_accelerator_is_counts_but_not_for_putting_together(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_accelerator(patch: pytest.MonkeyPatch, name: str) -> None:
        patch.setattr(torch.cuda, "get_device_name", lambda _: name)
        about = acemerge.output.identity._device("cuda")
        patch.setattr(acemerge.output.identity, "_device", lambda _: about)

    out = case.folder / "out"
    with monkeypatch.context() as patch:
        with_accelerator(patch, "A100")
        in_parts(case, out, 1, 2)
    with monkeypatch.context() as patch:
        with_accelerator(patch, "H100")
        refused(case, out, 'in part 1/3 accelerator is "A100" and not "H100"', shard="3/3")
    with monkeypatch.context() as patch:
        with_accelerator(patch, "A100")
        in_parts(case, out, 3)
    case.merge(out, finish=True)
    case.check_output(out)


def test_other_numbers_of_parts_do_not_mix(case: Case, out: Path) -> None:
    refused(case, out, "some of 2, some of 3", shard="1/2")
    case.merge(out, shard="1/2", overwrite=True)
    refused(case, out, "some of 2, some of 3", "remove those that are not wanted", finish=True)


def test_inputs_that_changed_after_a_part_are_named(case: Case, out: Path) -> None:
    weights = case.experts[0] / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes())
    refused(case, out, str(case.experts[0]), "was written to", finish=True)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-4], lambda data: data + b"more", lambda _: None])
def test_a_damaged_file_is_named_and_its_part_mends_it(
    case: Case, out: Path, damage: Callable[[bytes], bytes | None]
) -> None:
    name = next(iter(case.merge(out, shard="2/3").manifest["outputs"])) + PARTIAL
    data = damage((out / name).read_bytes())
    (out / name).unlink()
    if data is not None:
        (out / name).write_bytes(data)
    refused(case, out, name, "part 2/3 left it", "--shard 2/3", of=CheckpointError, finish=True)
    in_parts(case, out, 2)
    case.merge(out, finish=True)
    case.check_output(out)


def test_a_finished_run_is_not_finished_twice(case: Case, out: Path) -> None:
    case.merge(out, finish=True)
    refused(case, out, "holds a finished merge", finish=True)
    refused(case, out, "holds no part of a merge", finish=True, overwrite=True)
    refused(case, out, "holds a finished merge", shard="1/3")


def test_two_of_one_part_and_a_finish_before_its_time_are_locked_out(case: Case, out: Path) -> None:
    with locks.lock(out / ".acemerge.lock", shared=True), locks.lock(out / ".acemerge.shards/1-of-3/.acemerge.lock"):
        refused(case, out, "1-of-3: another run is writing here", of=WriteError, shard="1/3")
        refused(case, out, "another run is writing here", of=WriteError, finish=True)
        refused(case, out, "another run is writing here", of=WriteError, overwrite=True)
        in_parts(case, out, 2)


def test_parts_and_a_run_of_one_process_keep_apart(case: Case, out: Path) -> None:
    refused(case, out, "holds parts of an unfinished merge", "--resume", "--finish")
    case.merge(out, overwrite=True)
    case.check_output(out)
    other = case.folder / "other"
    other.mkdir()
    (other / ".acemerge.journal").write_text("")
    refused(case, other, "holds an unfinished merge that is not done in parts", shard="1/3", overwrite=True)


def test_a_part_that_fails_leaves_nothing_but_the_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    out = in_parts(case, case.folder / "out", 1)
    before = snapshot(out)

    def failing_write(*_: Any, **__: Any) -> None:
        raise NumericalError("tensor", "is not finite", "look at it")

    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.writing, "compute_all", failing_write)
        with pytest.raises(NumericalError):
            case.merge(out, shard="2/3")
    assert snapshot(out) == before


# --- who does what ----------------------------------------------------------------------------------------


def test_parts_of_a_driver_that_was_killed_may_take_a_moment_to_end(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = in_parts(case, case.folder / "out", 1)
    with contextlib.ExitStack() as held:
        held.enter_context(locks.lock(out / ".acemerge.lock", shared=True))
        threading.Timer(0.4, held.close).start()
        case.merge(out, resume=True)
    case.check_output(out)
    in_parts(case, case.folder / "other", 1)
    monkeypatch.setattr(acemerge.api, "_PATIENCE", 0.1)
    with locks.lock(case.folder / "other" / ".acemerge.lock", shared=True):
        refused(case, case.folder / "other", "another run is writing here", of=WriteError, resume=True)


def test_files_are_spread_by_their_work_and_no_part_is_empty() -> None:
    assert spread([90.0, 5.0, 5.0], 3) == [1, 2, 3]
    assert spread([5.0, 90.0, 5.0, 4.0], 2) == [2, 1, 2, 2]
    assert spread([0.0] * 4, 3) == [1, 2, 3, 1]
    assert spread([3.0, 3.0, 2.0, 2.0, 2.0], 2) == [1, 2, 1, 2, 1]


def test_a_part_is_written_as_it_is_read() -> None:
    assert parse_part("2/3") == Part(3, 2)
    assert str(Part(3, 2)) == "2/3"
    assert re.fullmatch(r"\.acemerge\.shards/2-of-3", Part(3, 2).folder)
