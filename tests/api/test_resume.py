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
import acemerge.engine.thresholds
import acemerge.engine.writing
from acemerge.checkpoints import files, locks, machine
from acemerge.engine.batched import compute_all
from acemerge.engine.compute import Computed
from acemerge.engine.work import Loaded
from acemerge.errors import CheckpointError, ResourceError, UsageError, WriteError
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

    monkeypatch.setattr(acemerge.engine.writing, "compute_all", counting)
    return names


def interrupt(case: Case, out: Path, tensors: int, **options: Any) -> None:
    """Begin a merge that is interrupted when so many tensors are written."""
    real = acemerge.engine.writing.TensorFiles.end_of_tensor
    done = 0

    def end_of_tensor(self: Any, names: list[str]) -> Any:
        nonlocal done
        if done == tensors:
            raise KeyboardInterrupt
        done += 1
        return real(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
        patch.setattr(acemerge.engine.writing.TensorFiles, "end_of_tensor", end_of_tensor)
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
    with pytest.raises(CheckpointError, match="did not finish"):
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


@pytest.mark.parametrize("method", ["ace", "average", "ties"])
def test_an_input_that_was_put_back_byte_for_byte_is_gone_on_with(
    case: Case, computed: list[str], method: str, tmp_path: Path
) -> None:
    case = Case(tmp_path / "again", method)
    out, shards = case.folder / "out", sorted(case.experts[1].glob("*.safetensors"))
    interrupt(case, out, 3)
    content = [shard.read_bytes() for shard in shards]
    for shard, data in zip(shards, content, strict=True):
        shard.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(UsageError, match=rf"cannot go on: input .*two {shards[0].name} was written to"):
        case.merge(out, resume=True)
    for shard, data in zip(shards, content, strict=True):
        shard.write_bytes(data)
    (case.base / "config.json").write_bytes((case.base / "config.json").read_bytes())
    computed.clear()
    interrupt(case, out, 0, resume=True)  # and what is known of the inputs stays known
    for shard, data in zip(shards, content, strict=True):
        shard.write_bytes(data)
    computed.clear()
    case.merge(out, resume=True)
    assert len(computed) == 1
    case.check_output(out)


def test_thresholds_hold_for_inputs_that_were_put_back(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They came of all that was read, twice, before the first tensor was written."""
    out, shards = case.folder / "out", sorted(case.experts[1].glob("*.safetensors"))
    interrupt(case, out, 0)
    for shard in shards:
        shard.write_bytes(shard.read_bytes())
    monkeypatch.setattr(acemerge.engine.thresholds, "_counts", None)
    case.merge(out, resume=True)
    case.check_output(out)


def test_what_was_read_again_of_an_input_that_was_written_to_proves_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second look at an expert need not have seen what was hashed at the first."""
    out, shard = case.folder / "out", next(case.experts[1].glob("*.safetensors"))
    counts = acemerge.engine.thresholds._counts
    content = shard.read_bytes()

    def changing(*arguments: Any) -> Any:
        shard.write_bytes(content[:-1] + b"\x01")
        found = counts(*arguments)
        shard.write_bytes(content)
        return found

    monkeypatch.setattr(acemerge.engine.thresholds, "_counts", changing)
    interrupt(case, out, 2)
    with pytest.raises(UsageError, match=rf"cannot go on: input .*two {shard.name} was written to"):
        case.merge(out, resume=True)


def test_a_configuration_that_was_written_to_is_refused(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    (case.base / "config.json").write_text('{"architectures": ["Somebody"]}')
    with pytest.raises(UsageError, match=r"cannot go on: input .*base config.json was written to; undo"):
        case.merge(out, resume=True)


@pytest.mark.usefixtures("two_threads")
def test_threads_decide_bytes_and_so_whether_to_go_on(case: Case) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    torch.set_num_threads(1)
    with pytest.raises(UsageError, match="cannot go on: threads was 2 and is 1"):
        case.merge(out, resume=True)


PROCESSORS = {
    "capability": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    "model": lambda patch: patch.setattr(machine, "processor", lambda: "AnotherMaker 6 85"),
    "switches MKL_CBWR": lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
    "switches ONEDNN_MAX_CPU_ISA": lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
}


@pytest.mark.parametrize("what", PROCESSORS)
def test_the_processor_decides_bytes_and_so_whether_to_go_on(case: Case, what: str) -> None:
    out = case.folder / "out"
    interrupt(case, out, 2)
    with pytest.MonkeyPatch.context() as patch:
        PROCESSORS[what](patch)
        with pytest.raises(UsageError, match=f"cannot go on: processor {what} was .* and is .*; undo the change"):
            case.merge(out, resume=True)
    case.merge(out, resume=True)
    case.check_output(out)


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
    out, outside = case.folder / "out", case.folder / "outside.acemerge.partial"
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


# What is done when all tensors are computed, and what may go wrong there.
BEHIND = {
    "card": ("acemerge.engine.beside.model_card", KeyError("a defect")),
    "picture": ("acemerge.engine.beside.shares_picture", ZeroDivisionError()),
    "configuration": ("acemerge.engine.beside.write_assets", CheckpointError("config.json", "is odd", "mend it")),
    "heads": ("acemerge.engine.beside.write_heads", CheckpointError("score", "is nan", "mend it")),
    "manifest": ("acemerge.runs.build_manifest", ValueError("a defect")),
    "publishing": ("acemerge.api.to_bytes", RecursionError()),
}


@pytest.mark.parametrize("step", BEHIND)
@pytest.mark.parametrize("over", [False, True])
def test_what_fails_behind_the_last_tensor_costs_no_weights(
    case: Case, computed: list[str], step: str, over: bool
) -> None:
    out, (name, failure) = case.folder / "out", BEHIND[step]
    earlier = case.merge_earlier(out) if over else {}

    def broken(*_: object) -> None:
        raise failure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, broken)
        with pytest.raises(type(failure)):
            case.merge(out, overwrite=over)
    assert snapshot(out).items() >= earlier.items()
    computed.clear()
    case.merge(out, resume=True, overwrite=over)
    assert computed == []
    case.check_output(out)


@pytest.mark.parametrize("card", ["license: mit\ndate: 2024-13-45", "license: !!bool maybe", "license: {<<: *a}"])
def test_a_card_that_cannot_be_read_costs_nothing(case: Case, card: str) -> None:
    (case.base / "README.md").write_text(f"---\n{card}\n---\n")
    case.merge(case.folder / "out")
    case.check_output(case.folder / "out")


NO_MEMORY = {
    "Python": MemoryError(),
    "torch": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
    ),
    "a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "a map": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "C++": RuntimeError("std::bad_alloc"),
}


@pytest.mark.parametrize("who", NO_MEMORY)
def test_no_memory_is_said_and_loses_nothing(
    case: Case, computed: list[str], who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = case.folder / "out", 0

    def compute(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise NO_MEMORY[who]
        return real(*arguments)

    real = acemerge.engine.writing.compute_all
    monkeypatch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acemerge.engine.writing, "compute_all", compute)
        with pytest.raises(ResourceError, match=r"there is not enough memory.*; allow more, or .*--resume") as caught:
            case.merge(out)
    assert caught.value.exit_code == 4
    computed.clear()
    case.merge(out, resume=True)
    assert 0 < len(computed) < 4
    case.check_output(out)


def test_a_tensor_that_does_not_fit_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(*_: object) -> None:
        raise NO_MEMORY["torch"]

    monkeypatch.setattr(acemerge.engine.pipeline._ValuesOf, "take", stored)
    with pytest.raises(
        ResourceError, match=r"tensor '.*weight': there is not enough memory: 4096 bytes could not be had"
    ):
        case.merge(case.folder / "out", method="average")


def test_no_threads_and_no_files_are_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    out = case.folder / "out"
    with faulty(1, failing(errno.EMFILE), lasting=True), pytest.raises(ResourceError, match="too many files are open"):
        case.merge(out)

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    with pytest.raises(ResourceError, match="no more threads can be started; raise the limit"):
        case.merge(out)


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
    with locks.lock(out / ".acemerge.lock"), pytest.raises(WriteError, match="another run is writing here"):
        case.merge(out, overwrite=True)


# The command line, which says when it is amid the import of torch, and stays there.
_HELD_IN_TORCH = """
import sys, time
class Held:
    def find_spec(name, path=None, target=None):
        if name == "torch.functional":
            print("torch", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Held)
from acemerge.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(case: Case, number: signal.Signals) -> None:
    """One line and an exit code, never a traceback, though an import may swallow exceptions. Later ones:
    attacks/interrupts.
    """
    words = ["merge", "--base", str(case.base), "--expert", str(case.experts[0]), "-o", str(case.folder / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", _HELD_IN_TORCH, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "torch\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    what, code = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}[number]
    assert process.returncode == code
    assert errors.startswith(f"acemerge: error: {what}: nothing ")
    assert errors.count("\n") == 1
