"""Windows and macOS, as far as they can be told from here: by what they lack, and by what they call a name."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import elsewhere
import pytest
from builders import PlainModel
from examples import ROOT

from acemerge.checkpoints import files, system
from acemerge.errors import LockedError

HERE, THERE = ["-m", "acemerge"], [str(ROOT / "tests/support/elsewhere.py")]


def python(*words: object) -> str:
    """What a run of Python prints. The width is fixed, for what `--help` looks like."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_loads_without_what_posix_alone_has() -> None:
    assert int(python(*THERE)) == len(elsewhere.every_module())


def test_commands_do_the_same_without_what_posix_alone_has(plain: PlainModel) -> None:
    base, experts = plain.save()
    words = ["--base", base, *(word for expert in experts for word in ("--expert", expert))]
    assert python(*THERE, "--help") == python(*HERE, "--help").replace("python -m acemerge", "elsewhere.py")
    plans = [python(*how, "plan", *words, "--json") for how in (HERE, THERE)]
    assert plans[0] == plans[1]
    for name, how in (("here", HERE), ("there", THERE)):
        python(*how, "merge", *words, "--quiet", "-o", plain.root / name)
    weights = [(plain.root / name / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert hashlib.sha256(weights[0]).digest() == hashlib.sha256(weights[1]).digest()
    assert sorted(os.listdir(plain.root / "here")) == sorted(os.listdir(plain.root / "there"))
    for name in os.listdir(plain.root / "there"):
        assert is_name_on_windows(name), name


def is_name_on_windows(name: str) -> bool:
    """Whether Windows takes it for one name, of a file: no drive or stream, no device, no end that it cuts off."""
    parsed = PureWindowsPath(name)
    return (
        len(parsed.parts) == 1
        and not parsed.drive
        and parsed.stem.upper().split(".")[0] not in {"CON", "PRN", "AUX", "NUL", *(f"COM{i}" for i in range(10))}
        and not set('<>:"|?*') & set(name)
        and name == name.rstrip(". ")
    )


@pytest.mark.parametrize("name", ["CON", "nul.txt", "a:b", "a\\b", "what?", "ends.", "ends "])
def test_a_name_that_windows_refuses_is_seen(name: str) -> None:
    assert not is_name_on_windows(name)


def _refused(path: Path) -> bool:
    with pytest.raises(LockedError, match="another run is writing here"), files.lock(path):
        pass
    return True


@pytest.mark.parametrize("shared", [False, True])
def test_without_flock_one_run_alone_holds_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setattr(system, "HAS_FLOCK", False)
    with files.lock(tmp_path / "lock", shared), multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_refused, (tmp_path / "lock",))
    with files.lock(tmp_path / "lock", shared):
        pass


def test_without_preadv_a_file_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(range(200)))
    found = []
    for there in (True, False):
        monkeypatch.setattr(system, "READS_AT_OFFSET", there)
        buffers = [memoryview(bytearray(n)) for n in (3, 70, 100)]
        descriptor = files.open_for_reading(tmp_path / "f")
        files.read_into(descriptor, buffers, 20, tmp_path / "f")
        files.close(descriptor)
        found.append([bytes(buffer) for buffer in buffers])
    assert found[0] == found[1] == [bytes(range(20, 23)), bytes(range(23, 93)), bytes(range(93, 193))]
