"""Bad checkpoints: each gives one typed error that names the file and the cure, before any tensor is read."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import raw_safetensors, write_checkpoint, write_sharded
from safetensors.torch import load_file, save_file

from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.hashes import check_unchanged
from acemerge.checkpoints.header import MAX_HEADER, MAX_PARTS, TensorSpec, read_header
from acemerge.errors import AcemergeError, CheckpointError
from acemerge.output.writer import header_bytes, split_shards, tensor_bytes


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = {"a": _entry([2], 0, 8)}
BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond the file": (1 << 63).to_bytes(8, "little") + b"{}",
    "header over the cap": (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
    "not json": raw_safetensors(b"{'a'"),
    "not utf-8": raw_safetensors(b'{"\xff": 1}'),
    "a list": raw_safetensors(b"[]"),
    "bottomless": raw_safetensors(b"[" * 100_000),
    "NaN in the header": raw_safetensors(b'{"a": NaN}'),
    "duplicate tensor": raw_safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "duplicate field": raw_safetensors(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "overlap": raw_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)),
    "hole": raw_safetensors({"a": _entry([2], 0, 8), "b": _entry([1], 12, 16)}, bytes(16)),
    "late start": raw_safetensors({"a": _entry([2], 4, 12)}, bytes(12)),
    "trailing bytes": raw_safetensors(ONE, bytes(9)),
    "truncated": raw_safetensors(ONE, bytes(7)),
    "shape and bytes disagree": raw_safetensors({"a": _entry([3], 0, 8)}, bytes(8)),
    "negative size": raw_safetensors({"a": _entry([-2], 0, 8)}, bytes(8)),
    "size that is true": raw_safetensors(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)),
    "size that overflows": raw_safetensors({"a": _entry([2**40, 2**40], 0, 8)}, bytes(8)),
    "reversed offsets": raw_safetensors({"a": _entry([2], 8, 0)}, bytes(8)),
    "three offsets": raw_safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', bytes(8)),
    "no dtype": raw_safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": raw_safetensors({"a": _entry([2], 0, 8, "F33")}, bytes(8)),
    "extra field": raw_safetensors({"a": {**ONE["a"], "run": "x"}}, bytes(8)),
    "metadata that is no table of strings": raw_safetensors({"__metadata__": {"a": 1}, **ONE}, bytes(8)),
    "fp8": raw_safetensors({"a": _entry([8], 0, 8, "F8_E4M3")}, bytes(8)),
}
HOSTILE_NAMES = [
    "../../etc/passwd", "/etc/passwd", "a/../b", "..", "a\\b", "C:\\x", "a\0b", "a\nb", "a\rb", "\x1b[31m", "",
    "x" * 600, "\u202egpj",
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(BAD_FILES[case])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "cure"),
    [
        ("F8_E4M3", "add --dequantize"),
        ("F4", "dequantise the checkpoint to bfloat16 first"),
        ("C64", "save the checkpoint again without it, or as real numbers"),
    ],
)
def test_values_that_cannot_be_merged_have_cures_by_their_type(dtype: str, cure: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors({"a": _entry([8], 0, 8, dtype)}, bytes(8)))
    with pytest.raises(CheckpointError, match=rf"has the type {dtype}, which cannot be merged; {cure}$"):
        open_checkpoint(tmp_path)


def test_json_of_too_many_parts_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    many = b'{"a": [' + b"[]," * (MAX_PARTS // 2) + b"0]}"
    write_sharded(tmp_path / "sharded", [{"a": torch.zeros(2)}])
    (tmp_path / "sharded" / "model.safetensors.index.json").write_bytes(many)
    write_checkpoint(tmp_path / "config", {"a": torch.zeros(2)})
    (tmp_path / "config" / "config.json").write_bytes(many)
    (tmp_path / "header").mkdir()
    (tmp_path / "header" / "model.safetensors").write_bytes(raw_safetensors(many))
    for place in ("sharded", "config", "header"):
        with pytest.raises(CheckpointError, match="more than the 1,000,000 that its JSON may have"):
            open_checkpoint(tmp_path / place)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_a_hostile_tensor_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors({name: ONE["a"]}, bytes(8)))
    with pytest.raises(CheckpointError, match="not allowed") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "sub/model.safetensors", "model.bin"], ids=repr)
def test_an_index_cannot_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": torch.zeros(2)}])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """A structure-aware fuzz: bytes of the header flipped, dropped or doubled."""
    good = raw_safetensors({"__metadata__": {"format": "pt"}, **ONE, "b": _entry([2, 2], 8, 24)}, bytes(24))
    rng, path = random.Random(0), tmp_path / "model.safetensors"
    refused = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) - 24)
            action = rng.randrange(3)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                del data[at]
            else:
                data[at:at] = data[at : at + rng.randint(1, 8)]
        path.write_bytes(data)
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 2000


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    good = raw_safetensors({**ONE, "b": _entry([2, 2], 8, 24)}, bytes(24))
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "np"}, {"format": "mlx"}, {"format": "pt", "by": "me"}])
def test_the_format_may_be_any_that_lays_tensors_out_alike(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    save_file({"a": values}, tmp_path / "model.safetensors", metadata=metadata)
    assert torch.equal(open_checkpoint(tmp_path).read("a"), values)


@pytest.mark.parametrize("kind", ["flax", "tf"])
def test_a_format_with_transposed_kernels_is_refused(kind: str, tmp_path: Path) -> None:
    save_file({"kernel": torch.zeros(2, 3)}, tmp_path / "model.safetensors", metadata={"format": kind})
    with pytest.raises(CheckpointError, match=r"saved by .*kernels transposed; load it with transformers"):
        open_checkpoint(tmp_path)


# --- folders and shards --------------------------------------------------------------------------------------

SHARDS = [{"a": torch.zeros(2)}, {"b": torch.ones(3)}]


def _index(folder: Path, change: dict[str, str | None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, file in change.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("extra", [{}, {"metadata": None}, {"metadata": {"total_size": "1", "x": 2}, "tool": [1]}])
def test_shards_of_other_tools(extra: dict[str, Any], tmp_path: Path) -> None:
    """Under any names, with an index that says nothing of sizes or much that nobody asked for."""
    names = ["consolidated.00.safetensors", "part_B-final.safetensors"]
    for name, shard in zip(names, SHARDS, strict=True):
        save_file(shard, tmp_path / name)
    weight_map = {tensor: name for name, shard in zip(names, SHARDS, strict=True) for tensor in shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({**extra, "weight_map": weight_map}))
    save_file({"stray": torch.zeros(1)}, tmp_path / "training_state.safetensors")  # no part of the model
    checkpoint = open_checkpoint(tmp_path)
    assert {name: checkpoint.read(name).tolist() for name in checkpoint.tensors} == {"a": [0, 0], "b": [1, 1, 1]}


def test_a_shard_in_a_folder_below_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / "sub").mkdir()
    (tmp_path / SECOND).rename(tmp_path / "sub" / SECOND)
    _index(tmp_path, {"b": f"sub/{SECOND}"})
    with pytest.raises(CheckpointError, match=r"'b' to 'sub/model-00002.*no file of this folder; .*plain file names"):
        open_checkpoint(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*in the index but not in the folder"):
        open_checkpoint(tmp_path)


def test_an_extra_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    _index(tmp_path, {"b": None})
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*not in the index"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, [SHARDS[0], {"a": torch.zeros(2), "b": torch.ones(3)}])
    _index(tmp_path, {"a": FIRST})
    with pytest.raises(CheckpointError, match="'a' is also in"):
        open_checkpoint(tmp_path)


def test_an_index_that_disagrees_with_the_headers(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    _index(tmp_path, {"c": FIRST})
    with pytest.raises(CheckpointError, match="lacks tensor 'c'"):
        open_checkpoint(tmp_path)
    _index(tmp_path, {"c": None, "b": FIRST, "a": SECOND})
    with pytest.raises(CheckpointError, match="the index puts tensor"):
        open_checkpoint(tmp_path)
    write_sharded(tmp_path, [{"a": torch.zeros(2), "extra": torch.zeros(1)}, SHARDS[1]])
    _index(tmp_path, {"extra": None})
    with pytest.raises(CheckpointError, match="'extra' is not in the index"):
        open_checkpoint(tmp_path)


def test_ambiguous_and_unfinished_folders(tmp_path: Path) -> None:
    write_sharded(tmp_path / "a", SHARDS)
    write_checkpoint(tmp_path / "a", SHARDS[0])
    write_sharded(tmp_path / "b", SHARDS)
    (tmp_path / "b" / "model.safetensors.index.json").unlink()
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "pytorch_model.bin").write_bytes(b"x")
    for name, message in {"a": "has both", "b": "no model", "c": "neither", "d": "pickled", "e": "no such"}.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_links_may_lead_inside_or_to_the_hub_cache_only(tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "elsewhere", SHARDS[0]) / "model.safetensors"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(real)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(tmp_path / "linked")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_bytes(real.read_bytes())
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert set(open_checkpoint(snapshot).tensors) == {"a"}
    for commit, allowed in (("0" * 40, True), ("abd", False)):
        nested = snapshot.with_name(commit) / "task"
        nested.mkdir(parents=True)
        (nested / "model.safetensors").symlink_to("../../../blobs/0123")
        if allowed:
            assert set(open_checkpoint(nested).tensors) == {"a"}
        else:
            with pytest.raises(CheckpointError, match="leaves the folder"):
                open_checkpoint(nested)


def test_special_files_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        open_checkpoint(tmp_path)


DEEP = '{"a": ' * 65 + "1" + "}" * 65


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', '{"quantization_config": {"bits": 4}}', DEEP])
def test_a_bad_config_is_refused(text: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHARDS[0])
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHARDS[0])
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="more than the"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SHARDS[0]))
    check_unchanged(checkpoint, {})
    os.truncate(tmp_path / "model.safetensors", 30)
    with pytest.raises(CheckpointError, match="changed during the run"):
        check_unchanged(checkpoint, {})
    with pytest.raises(CheckpointError, match="too early"):
        checkpoint.read("a")


# --- reading and writing agree with the reference ------------------------------------------------------------

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def test_what_is_read_is_what_the_reference_wrote(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.arange(12).reshape(3, 4) % 5).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    for name, value in tensors.items():
        assert torch.equal(checkpoint.read(name), value)


def test_what_is_written_is_what_the_reference_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.arange(12).reshape(3, 4).T % 5).to(dtype) for dtype in TYPES}
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    ((name, ordered),) = split_shards(specs, 1 << 20)
    content = header_bytes(ordered) + b"".join(tensor_bytes(tensors[spec.name]) for spec in ordered)
    (tmp_path / name).write_bytes(content)
    loaded = load_file(tmp_path / name)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert [info.spec for info in read_header(tmp_path / name)] == ordered


def test_shards_fill_up_to_the_limit_and_no_tensor_is_split() -> None:
    specs = [TensorSpec(f"t{i}", torch.float32, (size,)) for i, size in enumerate([10, 10, 30, 5, 5])]
    shards = split_shards(specs, 80)
    assert [name for name, _ in shards] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [[spec.name for spec in shard] for _, shard in shards] == [["t0", "t1"], ["t2"], ["t3", "t4"]]


def test_every_error_of_the_library_has_one_line() -> None:
    assert str(AcemergeError("a\nb", "c\x1b[0m", "d\r")) == "a\\nb: c\\x1b[0m; d\\r"
