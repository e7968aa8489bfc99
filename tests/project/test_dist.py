"""What a user installs: the wheel, into an empty environment, without extras."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from builders import PlainModel
from examples import ROOT


def run(*words: str | Path, **settings: str) -> str:
    """What a program prints; of this environment it knows nothing but the given settings."""
    known = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run([str(word) for word in words], env=known, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.torture
def test_the_wheel_merges_in_an_empty_environment(tmp_path: Path) -> None:
    pins = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, **pins)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = (file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert {str(file.relative_to(ROOT / "src")) for file in sources} <= packed

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", wheel, **pins)
    base, experts = PlainModel(tmp_path).save()
    named = [word for expert in experts for word in ("--expert", expert)]
    command = tmp_path / "venv/bin/acemerge"
    done = run(command, "merge", "--base", base, *named, "--method", "ace", "-o", tmp_path / "out", "--json")
    assert json.loads(done)["tensors"] == 6
    run(command, "verify", tmp_path / "out")
    where = run(python, "-c", "import acemerge; print(acemerge.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path)
