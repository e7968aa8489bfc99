"""How fast files are read and written is found without leaving anything, and whatever is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from acemerge.checkpoints import files, pace
from acemerge.checkpoints.pace import seconds_to_read, seconds_to_write


def test_the_very_files_are_read_a_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_CHUNK", 1 << 10)
    paths = [tmp_path / name for name in ("a", "b")]
    read: dict[Path, set[int]] = {path: set() for path in paths}
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    whole = files.read_into

    def noting(descriptor: files.Handle, buffers: list[memoryview], offset: int, path: Path) -> None:
        read[path].add(offset)
        whole(descriptor, buffers, offset, path)

    monkeypatch.setattr(files, "read_into", noting)
    reading, copying = seconds_to_read(paths)
    assert 0 < reading < 1
    assert 0 < copying < 1
    assert all(
        offsets == {(half << 19) + (i << 10) for half in range(2) for i in range(3)} for offsets in read.values()
    )


def test_what_cannot_be_read_or_is_in_a_store_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for paths in ([], [tmp_path / "none", tmp_path / "empty"], [Path("s3://bucket/model.safetensors")]):
        assert seconds_to_read(paths) == (0, 0)
    assert seconds_to_write(Path("s3://bucket/out")) == 0


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="needs Linux")
def test_the_output_s_place_is_written_to_and_has_no_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda d, block: written.append(len(block)) or write(d, block))
    before = tmp_path.stat().st_mtime_ns
    assert 0 < seconds_to_write(tmp_path / "not" / "there yet") < 1
    assert 0 < sum(written) <= 2 * 32 << 20  # once for the memory, once by the clock
    assert (list(tmp_path.iterdir()), tmp_path.stat().st_mtime_ns) == ([], before)


def test_a_place_that_takes_no_file_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refused)
    assert seconds_to_write(tmp_path) == 0
