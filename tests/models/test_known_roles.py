"""Roles that are known from before: the same, without transformers; and asked anew where anything differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import make_model

from acemerge.checkpoints import cache
from acemerge.checkpoints.folder import Checkpoint, open_checkpoint
from acemerge.models import known_roles
from acemerge.models.roles import Roles, find_roles

FAMILIES = ["gpt2", "qwen3_moe", "t5", "llava"]  # Conv1D, fused experts, tied tensors, a model within a model
_ASK = """
import json, sys
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.models.roles import find_roles
from pathlib import Path
found = []
for folder in sys.argv[1:]:
    checkpoint = open_checkpoint(Path(folder))
    found.append(repr(find_roles(checkpoint.config, checkpoint.tensors)))
print(json.dumps(["transformers" in sys.modules, found]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, for a process in which nobody else has loaded transformers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known_roles._installed.cache_clear()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "transformers", raising=False)
        assert known_roles._installed()
    yield tmp_path / "cache/acemerge/roles"
    known_roles._installed.cache_clear()


def _saved(family: str, folder: Path) -> Checkpoint:
    make_model(family).save_pretrained(folder)
    return open_checkpoint(folder)


def _asked(checkpoint: Checkpoint, untied: bool = False) -> Roles:
    return find_roles(checkpoint.config, checkpoint.tensors, untied)


def test_another_process_knows_the_same_without_transformers(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in FAMILIES]
    expected = [repr(_asked(_saved(family, folder))) for family, folder in zip(FAMILIES, folders, strict=True)]
    done = subprocess.run([sys.executable, "-c", _ASK, *folders], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, expected]


def test_what_is_known_is_what_the_architecture_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = _saved("qwen3_moe", tmp_path / "model")
    first = _asked(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("acemerge.models.roles.meta_model", None)
        assert _asked(checkpoint) == first
        with pytest.raises(TypeError):  # other roles, so asked
            _asked(checkpoint, untied=True)
        with pytest.raises(TypeError):
            find_roles({**checkpoint.config, "num_experts": 8}, checkpoint.tensors)
        with pytest.raises(TypeError):
            find_roles(checkpoint.config, dict(list(checkpoint.tensors.items())[1:]))


@pytest.mark.parametrize("damage", ["cut", "a bit", "empty", "a folder"])
def test_what_was_damaged_is_asked_again(damage: str, tmp_path: Path, folder: Path) -> None:
    checkpoint = _saved("gpt2", tmp_path / "model")
    first = _asked(checkpoint)
    (kept,) = folder.iterdir()
    data = kept.read_bytes()
    kept.unlink()
    if damage == "a folder":
        kept.mkdir()
    else:
        flipped = data[:200] + bytes([data[200] ^ 1]) + data[201:]
        kept.write_bytes({"cut": data[:-5], "a bit": flipped, "empty": b""}[damage])
    assert _asked(checkpoint) == first
    if damage != "a folder":
        assert kept.read_bytes() == data


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert _asked(_saved("gpt2", tmp_path / "model")).from_architecture


def test_nothing_is_kept_where_others_have_loaded_transformers(tmp_path: Path, folder: Path) -> None:
    known_roles._installed.cache_clear()
    assert _asked(_saved("gpt2", tmp_path / "model")).from_architecture
    assert not folder.exists()


def test_a_full_cache_begins_anew(folder: Path) -> None:
    for i in range(cache._MOST + 1):
        cache.keep("roles", f"{i:064}", b"x")
    assert [path.name for path in folder.iterdir()] == [f"{cache._MOST:064}"]
    assert cache.recall("roles", f"{cache._MOST:064}") == b"x"
