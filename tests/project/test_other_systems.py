"""What Windows and macOS do not have is not asked for. Neither system itself is tried here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import elsewhere
from builders import PlainModel

import acemerge
from acemerge.recipes.labels import expert_labels

# What Windows takes for a device whatever its ending, and what no name has there.
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}
_REFUSED = set('<>:"|?*\\')


def without_posix(*commands: Sequence[object]) -> str:
    """What the commands print, one after the other, behind an import of every module."""
    asked = json.dumps([list(map(str, words)) for words in commands])
    ran = subprocess.run([sys.executable, elsewhere.__file__, asked], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def is_windows_name(name: str) -> bool:
    """Whether Windows takes a relative path, and finds what is written there by it."""
    parts = PureWindowsPath(name).parts
    plain = not any(set(part) & _REFUSED or part.endswith((".", " ")) for part in parts)
    return plain and not any(part.split(".")[0].upper() in _RESERVED for part in parts)


def test_commands_do_the_same_without_posix(plain: PlainModel) -> None:
    base, experts = plain.save()
    models = ["--base", base, *(word for expert in experts for word in ("--expert", expert))]
    merge = ["merge", *models, "--quiet", "--max-shard-size", "300B", "-o"]
    whole, parts, ours = (plain.root / name for name in ("whole", "parts", "ours"))
    said = without_posix(
        ["--help"],
        ["plan", *models, "--json"],
        [*merge, whole],
        *([*merge, parts, *part] for part in (["--shard", "1/2"], ["--shard", "2/2"], ["--finish"])),
        ["verify", whole],
        [*merge, whole, "--overwrite"],
    )
    assert "Usage" in said
    assert '"tensors"' in said
    acemerge.merge(base, experts, out=ours, max_shard_size="300B")
    assert contents(whole) == contents(parts) == contents(ours)


def test_files_of_experts_have_names_that_every_system_has() -> None:
    for paths in (["a/CON", "b"], ["Math", "x/math"], ["C:\\models\\a", "b."], ["nul.x", "b"], ["lpt1", "com2"]):
        labels = expert_labels(paths)
        assert all(is_windows_name(f"heads/{label}.safetensors") for label in labels), labels
        assert len({label.lower() for label in labels}) == len(labels)
    assert expert_labels(["org/console", "b/null"]) == ["console", "null"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, under a name that Windows takes; the manifest tells of times."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert all(map(is_windows_name, found)), list(found)
    assert len({name.lower() for name in found}) == len(found)  # Windows and macOS do not tell case apart
    return {name: data for name, data in found.items() if name not in ("acemerge.json", "README.md")}
