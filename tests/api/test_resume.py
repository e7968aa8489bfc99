"""Going on with a run that was interrupted: nothing is done twice, the bytes are the same, or it is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel

import acemerge
import acemerge.engine.execute
import acemerge.engine.thresholds
from acemerge.checkpoints import files
from acemerge.engine.batched import compute_all
from acemerge.engine.compute import Computed
from acemerge.engine.work import Loaded
from acemerge.errors import CheckpointError, UsageError, WriteError
from acemerge.output.journal import _check
from acemerge.output.verify import verify
from attacks.faulty import failing, faulty, unfaulty
from attacks.merging import Case, content, snapshot


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, "ties")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the tensors that are computed from here on."""
    names: list[str] = []

    def counting(loaded: Loaded, *arguments: Any) -> list[Computed]:
        names.extend(piece.job.name for piece, _ in loaded)
        return compute_all(loaded, *arguments)

    monkeypatch.setattr(acemerge.engine.execute, "compute_all", counting)
    return names


def interrupt(case: Case, out: Path, tensors: int, **options: Any) -> None:
    """Begin a merge that is interrupted when so many tensors are written."""
    real = acemerge.engine.execute.TensorFiles.end_of_tensor
    done = 0

    def end_of_tensor(self: Any, names: list[str]) -> Any:
        nonlocal done
        if done == tensors:
            raise KeyboardInterrupt
        done += 1
        return real(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
        patch.setattr(acemerge.engine.execute.TensorFiles, "end_of_tensor", end_of_tensor)
        with pytest.raises(KeyboardInterrupt):
            case.merge(out, **options)


def test_what_is_done_is_not_done_again(case: Case, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = case.folder / "out"
    interrupt(case, out, 3)
    before = list(computed)
    assert len(set(before)) >= 3
    monkeypatch.setattr(acemerge.engine.thresholds, "_counts", None)  # found already, and noted
    computed.clear()
    case.merge(out, resume=True)
    assert computed == ["norm.weight"]
    case.check_output(out)


def test_resume_begins_where_there_is_nothing(case: Case) -> None:
    out = case.folder / "out"
    case.merge(out, resume=True)
    case.check_output(out)


def test_a_finished_run_is_verified_and_left(case: Case, computed: list[str]) -> None:
    out = case.folder / "reference"
    before = snapshot(out)
    report = case.merge(out, resume=True)
    assert computed == []
    assert snapshot(out) == before
    assert set(report.tensors) == set(json.loads(before["acemerge.json"])["tensors"])
    shard = next(out.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="altered since"):
        case.merge(out, resume=True)


def test_another_finished_merge_is_not_taken_for_ours(case: Case) -> None:
    with pytest.raises(UsageError, match="holds a finished merge of another run"):
        case.merge(case.folder / "reference", resume=True, method="average")


def test_an_unfinished_merge_is_kept_until_one_says_so(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    with pytest.raises(UsageError, match=r"holds an unfinished merge; add --resume to go on, or --overwrite"):
        case.merge(out)
    with pytest.raises(CheckpointError, match="not finished"):
        verify(out)
    case.merge(out, overwrite=True)
    case.check_output(out)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"method": "average"}, r'recipe method name was "ties" and is "average"'),
    "parameter": ({"keep": 0.5}, "recipe method keep was null and is 0.5"),
    "scale": ({"scale": 0.5}, "recipe scale was null and is 0.5"),
    "shards": ({"max_shard_size": "1MB"}, "largest shard was 384 and is 1000000"),
    "experts": ({"weights": [1.0, 2.0]}, "recipe experts was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_and_says_what_changed(case: Case, change: str) -> None:
    out, (options, message) = case.folder / "out", CHANGES[change]
    interrupt(case, out, 2)
    before = snapshot(out)
    with pytest.raises(UsageError, match=f"cannot go on: {message}"):
        case.merge(out, resume=True, **options)
    assert snapshot(out) == before
    case.merge(out, resume=True)
    case.check_output(out)


def test_an_input_that_was_written_to_is_refused(case: Case) -> None:
    out, shard = case.folder / "out", next(case.experts[1].glob("*.safetensors"))
    interrupt(case, out, 2)
    state = shard.stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))  # the time of change stays
    with pytest.raises(UsageError, match=rf"cannot go on: input .*two {shard.name} was written to; undo"):
        case.merge(out, resume=True)


def test_a_configuration_that_was_written_to_is_refused(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    (case.base / "config.json").write_text('{"architectures": ["Somebody"]}')
    with pytest.raises(UsageError, match=r"cannot go on: input .*base config.json was written to; undo"):
        case.merge(out, resume=True)


def test_threads_decide_bytes_and_so_whether_to_go_on(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    torch.set_num_threads(1)
    try:
        with pytest.raises(UsageError, match="cannot go on: threads was 2 and is 1"):
            case.merge(out, resume=True)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("damage", ["torn line", "altered line", "no line", "altered shard", "short shard", "no shard"])
def test_damage_costs_work_but_no_byte(case: Case, computed: list[str], damage: str) -> None:
    out = case.folder / "out"
    interrupt(case, out, 3)
    computed.clear()
    what, _, place = damage.partition(" ")
    path = out / ".acemerge.journal" if place == "line" else next(out.glob("model-00001*.partial"))
    data = path.read_bytes()
    if what in ("torn", "short"):
        path.write_bytes(data[:-20])
    elif what == "altered":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    else:
        path.unlink()
    case.merge(out, resume=True, overwrite=damage == "no line")
    assert len(computed) > 1
    case.check_output(out)


def test_a_journal_cannot_lead_out_of_the_folder(case: Case) -> None:
    out, outside = case.folder / "out", case.folder / "outside.partial"
    outside.write_bytes(b"precious")
    interrupt(case, out, 2)
    journal = out / ".acemerge.journal"
    lines = journal.read_bytes().splitlines()
    entry = json.loads(lines[-1].partition(b" ")[2])
    entry["files"] = {"../outside": [8, files.sha256(outside)]}
    line = json.dumps(entry).encode()
    journal.write_bytes(b"\n".join([*lines[:-1], _check(line) + b" " + line]) + b"\n")
    case.merge(out, resume=True)
    case.check_output(out)
    assert outside.read_bytes() == b"precious"


def test_a_full_disk_loses_nothing(case: Case, computed: list[str]) -> None:
    out = case.folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
        writes = 0

        def full(call: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal writes
            writes += call is os.write
            fault = failing(errno.ENOSPC) if call is os.write and writes > 8 else unfaulty
            return fault(call, *arguments, **options)

        with faulty(1, full, lasting=True), pytest.raises(WriteError, match="no space left on device; free space"):
            case.merge(out)
    done = len(list(out.glob("*.partial")))
    assert done
    computed.clear()
    case.merge(out, resume=True)
    assert len(set(computed)) < 4
    case.check_output(out)


def test_a_run_that_cannot_succeed_leaves_nothing(plain: PlainModel) -> None:
    plain.tuned[1]["layers.0.up.weight"][0, 0] = float("nan")
    base, experts = plain.save()
    with pytest.raises(CheckpointError):
        acemerge.merge(base, experts, out=plain.root / "out")
    assert not (plain.root / "out").exists()


def test_the_record_of_every_tensor_survives(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 3)
    case.merge(out, resume=True)
    manifest = verify(out)
    assert content(out)["acemerge.json"] == case.expected["acemerge.json"]
    assert all(record["seconds"] > 0 for record in manifest["tensors"].values())


def test_a_second_writer_is_told_to_wait(case: Case) -> None:
    out = case.folder / "out"
    out.mkdir()
    with files.lock(out / ".acemerge.lock"), pytest.raises(WriteError, match="another run is writing here"):
        case.merge(out, overwrite=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(case: Case, number: signal.Signals) -> None:
    """One line and an exit code, never a traceback, though an import may swallow exceptions. Later ones:
    attacks/interrupts.
    """
    words = ["merge", "--base", str(case.base), "--expert", str(case.experts[0]), "-o", str(case.folder / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "acemerge", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.6)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    what, code = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}[number]
    assert process.returncode == code
    assert errors.startswith(f"acemerge: error: {what}: nothing ")
    assert errors.count("\n") == 1
