"""Files of `torch.save` that are no plain state dict, or only pretend to be one: each refused in one line."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acemerge.checkpoints import archive, pickles
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.errors import CheckpointError

SINGLE = "pytorch_model.bin"


def _save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


CONTENTS: dict[str, tuple[Any, str]] = {
    "a number beside": ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is a int"),
    "an optimiser": ({"state_dict": {"a": torch.zeros(2)}, "optimizer": {"state": {0: 1}}}, "'optimizer' beside"),
    "two levels": ({"state_dict": {"state_dict": {"a": torch.zeros(2)}}}, "'state_dict' is a dict"),
    "a numbered tensor": ({0: torch.zeros(2)}, "'0' is a Tensor and no tensor under a name"),
    "a list": ([torch.zeros(2)], "holds a list"),
    "a tensor alone": (torch.zeros(2), "holds a Tensor"),
    "nothing": ({}, "empty table"),
    "nothing within": ({"state_dict": {}}, "empty table"),
    "a tuple as key": ({("a", 1): torch.zeros(2)}, "key that is a tuple"),
    "a transposed tensor": ({"a": torch.zeros(2, 3).T}, r"'a' is not stored row by row; .*contiguous"),
    "an expanded tensor": ({"a": torch.zeros(1, 3).expand(2, 3)}, "not stored row by row"),
    "a complex tensor": ({"a": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
    "a conjugate": ({"a": torch.zeros(2, dtype=torch.complex64).conj()}, "ComplexFloatStorage"),
    "a negated view": ({"a": torch.zeros(2, dtype=torch.complex64).conj().imag}, "ComplexFloat|negated|row by row"),
    "an 8-bit float": ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "no state dict needs"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "no state dict needs"),
    "a meta tensor": ({"a": torch.empty(2, device="meta")}, "meta"),
    "a module": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "a hostile name": ({"../a": torch.zeros(2)}, "not allowed"),
    "a set": ({"a": {1, 2}}, "no state dict needs"),
    "bytes": ({"a": b"123"}, "no state dict needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_state_dict_is_refused(case: str, tmp_path: Path) -> None:
    content, message = CONTENTS[case]
    _refused(_save(tmp_path / SINGLE, content), message)


def _refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path, allow_pickle=True)
    assert str(caught.value).isprintable()
    assert path.name in str(caught.value)


def _rewritten(path: Path, change: Callable[[str, bytes], dict[str, bytes]], **options: Any) -> Path:
    """The same archive with records changed: `change` gives the records that stand for one."""
    with zipfile.ZipFile(path) as archive_in:
        records = {name: archive_in.read(name) for name in archive_in.namelist()}
    with zipfile.ZipFile(path, "w", **options) as out:
        for name, content in records.items():
            for new_name, new_content in change(name, content).items():
                out.writestr(new_name, new_content)
    return path


def _is(end: str, new: dict[str, bytes]) -> Callable[[str, bytes], dict[str, bytes]]:
    return lambda name, content: new if name.endswith(end) else {name: content}


TOO_LARGE = pickles.MAX_PICKLE + 1
RECORDS: dict[str, tuple[Callable[[str, bytes], dict[str, bytes]], str]] = {
    "TorchScript": (_is("/version", {"x/code/a.py": b"1"}), "TorchScript"),
    "TorchScript constants": (_is("/version", {"x/constants.pkl": b"1"}), "TorchScript"),
    "a stranger": (_is("/version", {"x/evil.so": b"1"}), "no part of a state dict"),
    "a way up": (_is("/version", {"x/../version": b"1"}), "no part of a state dict"),
    "an absolute name": (_is("/version", {"/version": b"1"}), "no part of a state dict"),
    "no folder": (_is("/version", {"version": b"1"}), "no part of a state dict"),
    "two folders": (_is("/version", {"y/version": b"1"}), "not all in one folder"),
    "big-endian": (_is("/byteorder", {"pytorch_model/byteorder": b"big"}), "little-endian"),
    "no pickle": (_is("/data.pkl", {}), "no record data.pkl"),
    "no values": (_is("/data/0", {}), "not in the file as it says"),
    "too few values": (_is("/data/0", {"pytorch_model/data/0": bytes(7)}), "not in the file as it says"),
    "too large a pickle": (_is("/data.pkl", {"pytorch_model/data.pkl": bytes(TOO_LARGE)}), "over the limit"),
    "an empty pickle": (_is("/data.pkl", {"pytorch_model/data.pkl": b""}), "malformed"),
    "half a pickle": (lambda n, c: {n: c[:-9]} if n.endswith(".pkl") else {n: c}, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_an_archive_with_other_records_is_refused(case: str, tmp_path: Path) -> None:
    change, message = RECORDS[case]
    _refused(_rewritten(_save(tmp_path / SINGLE, {"a": torch.zeros(2)}), change), message)


def test_an_archive_written_by_another_zip_tool_is_read(tmp_path: Path) -> None:
    path = _save(tmp_path / SINGLE, {"a": torch.arange(3.0)})
    checkpoint = open_checkpoint(_rewritten(path, lambda name, content: {name: content}), allow_pickle=True)
    assert checkpoint.read("a").tolist() == [0, 1, 2]


def _central(data: bytearray, name: bytes) -> int:
    """Where the directory's entry of a record begins."""
    return data.rindex(name) - 46


def _patched(path: Path, record: bytes, field: int, form: str, value: int, local: bool = False) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(record) - 30 if local else _central(data, record)
    struct.pack_into(form, data, at + field, value)
    path.write_bytes(data)
    return path


PATCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "encrypted": ((b"pytorch_model/data/0", 8, "<H", 1), "encrypted"),
    "encrypted by its own header": ((b"pytorch_model/data/0", 6, "<H", 1, True), "not what the zip directory says"),
    "compressed by its own header": ((b"pytorch_model/data/0", 8, "<H", 8, True), "not what the zip directory says"),
    "another name in its own header": ((b"pytorch_model/data/0", 30, "<B", 0, True), "not what the zip directory says"),
    "sizes that differ": ((b"pytorch_model/data/0", 24, "<I", 9), "compressed"),
    "beyond the file": ((b"pytorch_model/data/0", 42, "<I", 1 << 30), "outside the file"),
    "in another record": ((b"pytorch_model/data/1", 42, "<I", 0), "not what the zip directory says"),
}


@pytest.mark.parametrize("case", PATCHES)
def test_a_lying_archive_is_refused(case: str, tmp_path: Path) -> None:
    patch, message = PATCHES[case]
    path = _save(tmp_path / SINGLE, {"a": torch.zeros(2), "b": torch.ones(2)})
    _refused(_patched(path, *patch), message)


def test_records_that_overlap_or_run_out_of_the_file_are_refused(tmp_path: Path) -> None:
    for size, message in ((200, "overlaps"), (1 << 20, "beyond its data|overlaps")):
        path = _save(tmp_path / SINGLE, {"a": torch.zeros(2), "b": torch.ones(2)})
        for field in (20, 24):
            _patched(path, b"pytorch_model/data/0", field, "<I", size)
        _refused(path, message)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    _refused(path, "older pickle")
    path.write_bytes(b"x" * 300)
    _refused(path, "older pickle")
    path.write_bytes(b"")
    _refused(path, "older pickle")
    _refused(_rewritten(_save(path, {"a": torch.zeros(2)}), lambda n, c: {n: c}, compression=8), "compressed")
    good = _save(path, {"a": torch.zeros(2)}).read_bytes()
    path.write_bytes(good[:40] + good)
    _refused(path, "not begin with its first record|not what the zip directory")
    path.write_bytes(good[:-20])
    _refused(path, "directory is damaged")


@pytest.mark.filterwarnings("ignore::UserWarning:zipfile")
def test_a_record_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / SINGLE, {"a": torch.zeros(2)})
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("pytorch_model/data/0", bytes(8))
    _refused(path, "stands twice")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / SINGLE, {"a": torch.zeros(2)})
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path, allow_pickle=True)


def test_a_directory_without_end_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / SINGLE, {"a": torch.zeros(2)})
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 100)
    _refused(path, "directory of .* over the limit of 100")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_TENSORS", -15)
    _refused(path, "records that a shard may hold")


# --- the pickle itself --------------------------------------------------------------------------------------


def _with_pickle(path: Path, program: bytes) -> Path:
    _save(path, {"a": torch.zeros(2)})
    return _rewritten(path, lambda name, content: {name: program if name.endswith("data.pkl") else content})


_STORE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%btQ"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def _tensor(storage: bytes = _STORE % b"K\x02", offset: bytes = b"K\x00", shape: bytes = b"K\x02\x85") -> bytes:
    return _REBUILD + storage + offset + shape + b"K\x01\x85" + b"\x89" + b"N" + b"tR"


def _table(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


PROGRAMS: dict[str, tuple[bytes, str]] = {
    "os.system": (_table(b"cos\nsystem\nX\x02\x00\x00\x00id\x85R"), "names 'os.system'"),
    "a call of what is no function": (_table(b"}}R"), "call that no state dict"),
    "a change of what is no table": (_table(b"K\x01}b"), "as if it were a dict"),
    "an empty stack": (b"\x80\x02R.", "malformed"),
    "an unknown memo": (b"\x80\x02h\x05.", "malformed"),
    "no end": (b"\x80\x02}", "malformed"),
    "an offset outside": (_table(_tensor(offset=b"K\x01")), "beyond its storage"),
    "a negative offset": (_table(_tensor(offset=b"J\xff\xff\xff\xff")), "malformed tensor"),
    "a true size": (_table(_tensor(shape=b"\x88\x85")), "malformed tensor"),
    "another number of strides": (_table(_tensor(shape=b"K\x01K\x02\x86")), "malformed tensor"),
    "a quantised tensor": (_table(b"ctorch._utils\n_rebuild_qtensor\n"), "names 'torch._utils._rebuild_qtensor'"),
    "a quantised storage": (_table(b"ctorch\nQInt8Storage\n"), "values of the type torch.QInt8Storage"),
    "a size too large": (_table(_tensor(shape=b"\x8a\x06\xff\xff\xff\xff\xff\x7f\x85")), "beyond its storage"),
    "a storage that is too large": (_table(_tensor(_STORE % b"J\x00\x00\x00\x7f")), "not in the file"),
    "a negative storage": (_table(_tensor(_STORE % b"J\xff\xff\xff\xff")), "malformed storage"),
    "no storage": (_table(_tensor(storage=b"N")), "malformed tensor"),
    "another persistent thing": (_table(b"(X\x06\x00\x00\x00moduleNNNNtQ"), "no storage"),
    "a key that stands twice": (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "'a' stands twice"),
    "a protocol of later days": (pickle.dumps({"a": 1}, protocol=4), "no state dict needs"),
    "a hash without end": (b"\x80\x02}" + b")" + b"\x85" * 900_000 + b"Ns.", "key that is a tuple"),
    "instructions without end": (b"\x80\x02" + b"N" * 1_100_000 + b".", "more than 1,000,000 instructions"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_hostile_pickle_is_refused(case: str, tmp_path: Path) -> None:
    program, message = PROGRAMS[case]
    _refused(_with_pickle(tmp_path / SINGLE, program), message)


def test_the_programs_above_start_from_one_that_is_read(tmp_path: Path) -> None:
    path = _with_pickle(tmp_path / SINGLE, _table(_tensor()))
    assert open_checkpoint(path, allow_pickle=True).read("a").tolist() == [0, 0]
