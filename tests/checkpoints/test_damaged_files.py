"""Files that are not what they should be: what is advised can be done, and helps."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from builders import PlainModel, write_checkpoint, write_sharded

import acemerge
from acemerge.checkpoints import files
from acemerge.errors import CheckpointError, WriteError
from acemerge.output.verify import verify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def _refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as failure:
        acemerge.merge(folder, [folder], "average", allow_pickle=True, force=True)
    return failure.value


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "pytorch_model.bin", "model.safetensors.index.json"),
        *("tokenizer.model", "merges.txt"),  # copied as they are
    ],
)
def test_a_pointer_of_git_lfs_is_told(name: str, plain: PlainModel) -> None:
    """Fetching it again in the same way gives the same pointer."""
    folder = write_checkpoint(plain.root / "m", plain.base, {"model_type": "bert", "vocab_size": 11})
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(POINTER)
    found = _refused(folder)
    assert found.where.endswith(f"/{name}")
    assert found.what == "is a pointer of Git LFS, and the file itself was not fetched"
    assert "git lfs pull" in found.cure


@pytest.mark.parametrize("damaged", ["", "[", "{}"])
def test_a_damaged_index_is_fetched_again(damaged: str, plain: PlainModel) -> None:
    items = list(plain.base.items())
    folder = write_sharded(plain.root / "m", [dict(items[:3]), dict(items[3:])])
    (folder / "model.safetensors.index.json").write_text(damaged)
    found = _refused(folder)
    assert found.where.endswith("model.safetensors.index.json")
    assert found.cure == "fetch the index again"


def _without(name: str, file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        kept = {entry: archive.read(entry) for entry in archive.namelist() if not entry.endswith(name)}
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in kept.items():
            archive.writestr(entry, data)


def test_a_damaged_pickle_is_fetched_again(plain: PlainModel) -> None:
    """`torch.load`, which would be needed to save it anew, reads it neither."""
    (plain.root / "m").mkdir()
    file = plain.root / "m/pytorch_model.bin"
    for damage in (
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(b"<!DOCTYPE html>"),
        lambda: file.write_bytes(file.read_bytes()[:-30]),
        lambda: _without("data.pkl", file),
        lambda: _without("data/0", file),
    ):
        torch.save(plain.base, file)
        damage()
        with pytest.raises(Exception):  # noqa: B017, PT011  of many types
            torch.load(file)
        assert _refused(file.parent).cure.startswith("fetch ")
    torch.save(plain.base, file, _use_new_zipfile_serialization=False)
    assert _refused(file.parent).cure.startswith("load it where you trust it")


def test_nobody_is_told_to_remove_a_file_that_is_needed(plain: PlainModel) -> None:
    (plain.root / "f").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"more than the 4 that such a file may have; .*fetch it") as failure:
        files.read_small(plain.root / "f", 4)
    assert "remove" not in failure.value.cure


def test_a_damaged_manifest(plain: PlainModel) -> None:
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, "average", out)
    whole = (out / "acemerge.json").read_bytes()
    (out / "acemerge.json").write_bytes(whole[:100])
    for fail in (lambda: verify(out), lambda: acemerge.merge(base, experts, "average", out, resume=True)):
        with pytest.raises(CheckpointError, match=r"not valid JSON .*; make the output again with --overwrite"):
            fail()
    acemerge.merge(base, experts, "average", out, overwrite=True)
    assert verify(out)


def test_a_damaged_manifest_of_a_run_that_was_killed_while_publishing(plain: PlainModel) -> None:
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, "average", out)
    whole = (out / "acemerge.json").read_bytes()
    (out / "acemerge.json").unlink()
    earlier = out / "acemerge.json.acemerge.old"
    earlier.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"not valid JSON .*; restore the file, or choose another folder"):
        acemerge.merge(base, experts, "average", out, overwrite=True)
    earlier.write_bytes(json.dumps(json.loads(whole)).encode())
    acemerge.merge(base, experts, "average", out, overwrite=True)
    assert verify(out)


@pytest.mark.parametrize(
    ("code", "first"),
    [
        (errno.ENOSPC, "free space or "),
        (errno.EACCES, "give access to its folder or "),
        (errno.EFBIG, "raise the limit on the size of files (ulimit -f) or "),
        (errno.EIO, "check the disk or "),
        (errno.EROFS, ""),
        (errno.ENOTDIR, ""),
    ],
)
def test_space_is_not_to_be_freed_where_it_is_not_short(code: int, first: str) -> None:
    with pytest.raises(WriteError) as failure, files.writing(Path("out")):
        raise OSError(code, os.strerror(code))
    assert failure.value.cure == f"{first}choose another output folder, then run again"
