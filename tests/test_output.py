"""What is published: complete, verified, and never half a model."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import acemerge
from acemerge.checkpoints import files
from acemerge.checkpoints.writer import output_folder
from acemerge.errors import AcemergeError, CheckpointError, UsageError, WriteError
from acemerge.report.manifest import to_bytes
from acemerge.verify import verify
from builders import PlainModel, load_folder, write_checkpoint


@pytest.fixture
def out(plain: PlainModel) -> Path:
    """A published output with a head, a config and two shards."""
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    base, experts = plain.save()
    (base / "config.json").write_text('{"architectures": ["Nobody"]}')
    (base / "tokenizer.json").write_text("{}")
    acemerge.merge(base, experts, out=plain.root / "out", max_shard_size="400B")
    return plain.root / "out"


def _snapshot(folder: Path) -> dict[str, bytes]:
    """The content of a folder, but for a lock file: one that could not be removed is free and does no harm."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".acemerge.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_output_is_complete_and_verifies(out: Path) -> None:
    files_there = set(_snapshot(out))
    manifest = verify(out)
    assert files_there == {*manifest["outputs"], "acemerge.json"}
    assert {"config.json", "tokenizer.json", "README.md", "heads/e1.safetensors"} <= files_there
    assert manifest["tensors"].keys() == load_folder(out).keys()
    assert all({"role", "rule", "reason", "status", "seconds"} <= set(r) for r in manifest["tensors"].values())
    by_ace = manifest["tensors"]["layers.0.up.weight"]
    assert {"gamma", "branch", "energies", "eps", "condition", "rank"} <= set(by_ace)
    base_file = manifest["inputs"][0]["files"]["model.safetensors"]
    assert base_file["sha256"] == files.sha256(out.parent / "base" / "model.safetensors")


def test_the_model_card_names_base_experts_and_recipe(out: Path) -> None:
    card = (out / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert all(name in card for name in ("name: ace", "`base`", "`e1`", "`e3`", "from_pretrained", "heads/"))


def test_verify_finds_any_flipped_bit(out: Path) -> None:
    rng = random.Random(0)
    paths = [path for path in out.rglob("*") if path.is_file()]
    for trial in range(500):
        path = paths[trial % len(paths)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify(out)
        path.write_bytes(good)
    verify(out)


@pytest.mark.parametrize("name", ["heads/evil.safetensors", "model.safetensors", "tokenizer_config.json"])
def test_verify_finds_a_file_too_many(out: Path, name: str) -> None:
    (out / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not in the manifest"):
        verify(out)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"/etc/passwd": {"sha256": "0", "bytes": 1}}},
        {"outputs": {"../base/model.safetensors": {"sha256": "0", "bytes": 1}}},
        {"outputs": {}},
        {"outputs": []},
        {"tensors": 3},
        {"heads": {"e1": 2}},
    ],
    ids=str,
)
def test_verify_trusts_no_manifest_however_well_signed(out: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((out / "acemerge.json").read_text())
    outputs = change.get("outputs")
    if outputs:
        change = {"outputs": manifest["outputs"] | outputs}
    (out / "acemerge.json").write_bytes(to_bytes({**manifest, **change}))
    with pytest.raises(CheckpointError, match=r"leaves the folder|not in the manifest|is malformed"):
        verify(out)


@pytest.mark.parametrize(
    "name", ["README.md", "acemerge.json", "heads/e1.safetensors", "model-00001-of-00003.safetensors"]
)
def test_verify_finds_a_missing_file(out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(CheckpointError):
        verify(out)


def test_verify_finds_values_that_are_not_finite_even_if_hashed(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out")
    weights = load_folder(plain.root / "out")
    weights["layers.0.up.weight"][1, 2] = float("nan")
    write_checkpoint(plain.root / "out", weights)
    manifest = json.loads((plain.root / "out" / "acemerge.json").read_text())
    path = plain.root / "out" / "model.safetensors"
    manifest["outputs"][path.name] = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    (plain.root / "out" / "acemerge.json").write_bytes(to_bytes(manifest))
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight' is nan at \[1, 2\]"):
        verify(plain.root / "out")


def test_an_output_is_never_replaced_unasked(out: Path) -> None:
    base, experts = out.parent / "base", [out.parent / "e1"]
    before = _snapshot(out)
    with pytest.raises(UsageError, match=r"holds a finished merge; .*--overwrite"):
        acemerge.merge(base, experts, out=out)
    assert _snapshot(out) == before
    acemerge.merge(base, experts, out=out, overwrite=True, method="average")
    verify(out)
    assert not list(out.glob("model-*"))


def test_a_folder_with_other_things_is_left_alone(plain: PlainModel) -> None:
    base, experts = plain.save()
    (plain.root / "mine").mkdir()
    (plain.root / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        acemerge.merge(base, experts, out=plain.root / "mine")
    acemerge.merge(base, experts, out=plain.root / "mine", overwrite=True)
    assert (plain.root / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("place", ["base", "base/inside", "e2", "."])
def test_the_output_stays_apart_from_the_inputs(plain: PlainModel, place: str) -> None:
    base, experts = plain.save()
    with pytest.raises(UsageError, match="same folder as, inside or around the input"):
        acemerge.merge(base, experts, out=plain.root / place, overwrite=True)


def test_links_and_files_are_no_output(plain: PlainModel) -> None:
    base, experts = plain.save()
    (plain.root / "real").mkdir()
    (plain.root / "link").symlink_to(plain.root / "real")
    (plain.root / "file").write_text("x")
    with pytest.raises(UsageError, match="is a link"):
        acemerge.merge(base, experts, out=plain.root / "link", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        acemerge.merge(base, experts, out=plain.root / "file", overwrite=True)


# --- faults of the operating system --------------------------------------------------------------------------

CALLS = ["write", "fsync", "open", "replace", "unlink", "preadv", "listdir", "stat", "makedirs"]


class _FailAt:
    """Counts the calls that `files` makes to the operating system and fails the k-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, code: int) -> None:
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(files.os, name, self._wrap(getattr(os, name), k, code))

    def _wrap(self, call: Callable[..., Any], k: int, code: int) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_filename != files.__file__:
                return call(*args, **kwargs)
            self.count += 1
            if self.count == k:
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return failing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_every_failing_call_leaves_the_earlier_output_intact(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Row 19: the k-th call fails, for every k until a run passes untouched."""
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, out=out, method="average")
    earlier = _snapshot(out)
    for k in range(1, 10_000):
        with monkeypatch.context() as patch:
            fault = _FailAt(patch, k, code)
            try:
                acemerge.merge(base, experts, out=out, overwrite=True)
            except (CheckpointError, WriteError):
                finished = False
            else:
                finished = True
        if finished:
            if fault.count < k:
                break
            verify(out)  # a failure while tidying up after publishing
            acemerge.merge(base, experts, out=out, overwrite=True, method="average")
            earlier = _snapshot(out)
            continue
        assert _snapshot(out) == earlier, f"call {k}"
    assert k > 60
    verify(out)


def test_a_rename_that_keeps_failing_is_mended_by_the_next_run(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither publishing nor rolling back can go on: nothing looks finished, and nothing is lost."""
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, out=out, method="average", max_shard_size="400B")
    earlier, replace = _snapshot(out), os.replace
    for k in range(1, 100):
        with monkeypatch.context() as patch:
            calls = iter(range(1, 1000))

            def failing(source: Any, target: Any, calls: Any = calls, k: int = k) -> None:
                if next(calls) > k:
                    raise OSError(errno.EIO, "broken")
                replace(source, target)

            patch.setattr(files.os, "replace", failing)
            try:
                acemerge.merge(base, experts, out=out, overwrite=True)
            except WriteError:
                pass
            else:
                break
        assert not (out / "acemerge.json").exists()
        with pytest.raises(UsageError, match="is not empty"):
            acemerge.merge(base, experts, out=out)
        with output_folder(out, overwrite=True):
            assert _snapshot(out) == earlier
    assert k > 6
    verify(out)


def test_short_writes_are_continued(plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = plain.save()
    whole = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: whole(descriptor, data[:7]))
    acemerge.merge(base, experts, out=plain.root / "out")
    verify(plain.root / "out")


# --- killed, interrupted, raced ------------------------------------------------------------------------------

_SLOW = """
import sys, time, acemerge.run as run, acemerge.compute as compute
real = compute.compute
def slow(job, inputs):
    print("computing", flush=True)
    time.sleep(0.2)
    return real(job, inputs)
run.compute = slow
from acemerge.cli import main
main(sys.argv[1:])
"""


def _start_slow_merge(plain: PlainModel, out: Path) -> subprocess.Popen[str]:
    base, experts = plain.save()
    words = ["merge", "--base", str(base), *(w for e in experts for w in ("--expert", str(e))), "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_and_says_so(plain: PlainModel, number: signal.Signals) -> None:
    process = _start_slow_merge(plain, plain.root / "out")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "acemerge: error: interrupted: nothing was published; run the same command again\n"
    assert not (plain.root / "out").exists()


def test_a_killed_run_never_looks_finished(plain: PlainModel) -> None:
    out = plain.root / "out"
    process = _start_slow_merge(plain, out)
    process.kill()
    process.wait()
    assert not (out / "acemerge.json").exists()
    assert not list(out.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="not finished"):
        verify(out)
    acemerge.merge(plain.root / "base", [plain.root / "e1"], out=out, overwrite=True)
    verify(out)
    assert not list(out.glob("*.partial"))


def _race(base: Path, expert: Path, out: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        acemerge.merge(base, [expert], out=out)
        results.put("merged")
    except AcemergeError as error:
        results.put(type(error).__name__)


def test_two_writers_on_one_folder(plain: PlainModel) -> None:
    """One wins, the other is refused by the lock or by the finished output; the result verifies."""
    base, experts = plain.save()
    context = multiprocessing.get_context("fork")
    for trial in range(5):
        out, barrier, results = plain.root / f"race{trial}", context.Barrier(2), context.Queue()
        racers = [context.Process(target=_race, args=(base, experts[i], out, barrier, results)) for i in (0, 1)]
        for racer in racers:
            racer.start()
        outcomes = sorted(results.get(timeout=30) for _ in racers)
        for racer in racers:
            racer.join()
        assert outcomes[1] == "merged"
        assert outcomes[0] in ("UsageError", "WriteError")
        verify(out)


def test_a_second_writer_is_told_to_wait(plain: PlainModel) -> None:
    out = plain.root / "out"
    process = _start_slow_merge(plain, out)
    try:
        with pytest.raises(WriteError, match="another run is writing here"):
            acemerge.merge(plain.root / "base", [plain.root / "e1"], out=out, overwrite=True)
    finally:
        process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while not (out / "acemerge.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    verify(out)
