"""What is copied for readers of folders: only what is wanted, once, and anew when an object is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import PermissionDeniedError
from stores import FaultyClient

from acemerge.checkpoints import files
from acemerge.checkpoints.weight_files import is_model_file
from acemerge.errors import CheckpointError


def test_a_copy_is_kept_until_an_object_changes(
    memory: FaultyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = Path("s3://bucket/model")
    held = {"model.safetensors": b"weights", "config.json": b"{}", "1_Pooling/config.json": b"[]", "train.py": b"run"}
    for name, data in held.items():
        memory.held.put(f"model/{name}", data)
    copy = files.local_copy(address, is_model_file)
    assert {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == {
        name: data for name, data in held.items() if name != "train.py"
    }
    memory.calls.clear()
    assert files.local_copy(address, is_model_file) == copy
    assert not [call for call in memory.calls if call.startswith("get")]
    memory.held.put("model/config.json", b"[]")
    assert (files.local_copy(address, is_model_file) / "config.json").read_bytes() == b"[]"
    assert files.local_copy(tmp_path, is_model_file) == tmp_path


def test_two_copies_at_once_are_one_and_what_fails_leaves_nothing(
    memory: FaultyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory.held.put("model/config.json", b"{}")
    again: list[Path] = []

    def another_is_first(call: str, key: str, do: Callable[[], Any]) -> Any:
        if call == "get" and not again:
            again.append(tmp_path)
            again.append(files.local_copy(Path("s3://bucket/model"), is_model_file))
        return do()

    memory.fault = another_is_first
    copy = files.local_copy(Path("s3://bucket/model"), is_model_file)
    assert again == [tmp_path, copy]
    assert list(copy.parent.iterdir()) == [copy]

    def denied(call: str, key: str, do: Callable[[], Any]) -> Any:
        if call == "get":
            raise PermissionDeniedError("status code: 403")
        return do()

    memory.held.put("model/config.json", b"[]")
    memory.fault = denied
    with pytest.raises(CheckpointError, match="access is refused"):
        files.local_copy(Path("s3://bucket/model"), is_model_file)
    assert list(copy.parent.iterdir()) == [copy]


def test_no_key_leads_out_of_the_copy(memory: FaultyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def hostile(call: str, key: str, do: object) -> object:
        found = {"path": "model/..", "size": 1, "e_tag": "x", "version": None}
        return {"objects": [found], "common_prefixes": []} if call == "list_with_delimiter" else None

    memory.fault = hostile
    with pytest.raises(CheckpointError, match=r"has the key '\.\.', which is no path"):
        files.local_copy(Path("s3://bucket/model"), lambda name: True)
    assert list(tmp_path.iterdir()) == []
