"""Weights of `torch.save`: refused by default, and with `allow_pickle` read as data to the same bytes."""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, write_checkpoint
from torch import Tensor, nn

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.header import read_header
from acemerge.checkpoints.pickles import read_pickle
from acemerge.errors import CheckpointError

SINGLE = "pytorch_model.bin"
TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def _save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _same(a: Tensor, b: Tensor) -> bool:
    same_bits = torch.equal(a.reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and same_bits


# --- what is read -------------------------------------------------------------------------------------------


def _values() -> dict[str, Tensor]:
    numbers = torch.arange(12).reshape(3, 4) % 5 - 2
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    values = {str(dtype): numbers.to(dtype) for dtype in TYPES}
    values |= {"whole": whole, "tied": whole, "rows": whole[2:5], "row": whole[5], "column of one": whole[:, :1][:1]}
    values |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "nan": torch.tensor([float("nan"), -0.0])}
    return values | {"parameter": nn.Parameter(torch.ones(2, 3)), "half rows": whole.bfloat16()[1:]}


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda values: {"state_dict": values}], ids=["dict", "od", "deep"])
def test_every_value_is_read_bit_for_bit(wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    values = _values()
    _save(tmp_path / SINGLE, wrap(values))
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.tensors.keys() == values.keys()
    assert all(_same(checkpoint.read(name), value) for name, value in values.items())
    loaded = torch.load(tmp_path / SINGLE, weights_only=True)
    assert all(_same(checkpoint.read(name), value) for name, value in loaded.get("state_dict", loaded).items())


def test_the_places_are_those_that_torch_itself_finds(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = _save(tmp_path / SINGLE, _values())
    with FakeTensorMode():
        fakes = torch.load(path, weights_only=True)
    for info in read_pickle(path):
        fake = fakes[info.spec.name]
        start = fake.untyped_storage()._checkpoint_offset
        assert info.offset == start + fake.storage_offset() * fake.dtype.itemsize
        assert info.spec.shape == tuple(fake.shape)
        assert info.spec.dtype == fake.dtype


def test_the_state_dict_of_a_module_with_its_versions(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = _save(tmp_path / "model.pt", module.state_dict())
    checkpoint = open_checkpoint(path, allow_pickle=True)
    assert checkpoint.tensors.keys() == module.state_dict().keys()
    assert checkpoint.config == {}


def test_tensors_come_in_the_order_of_a_safetensors_file(tmp_path: Path) -> None:
    values = {name: value.clone() for name, value in _values().items()}
    write_checkpoint(tmp_path, values)
    _save(tmp_path / SINGLE, dict(reversed(values.items())))
    specs = [info.spec for info in read_header(tmp_path / "model.safetensors")]
    assert [info.spec for info in read_pickle(tmp_path / SINGLE)] == specs


def _as_pickles(folder: Path, shards: int = 1) -> None:
    """Turn a folder's model.safetensors into pickled weights."""
    checkpoint = open_checkpoint(folder)
    names = list(checkpoint.tensors)
    values = {name: checkpoint.read(name) for name in names}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        _save(folder / SINGLE, values)
        return
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        _save(folder / file, {name: values[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _model_bytes(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_gives_the_same_model_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = PlainModel(tmp_path, dtype).save()
    acemerge.merge(base, experts, out=tmp_path / "expected")
    for folder in (base, *experts):
        _as_pickles(folder)
    acemerge.merge(base, experts, out=tmp_path / "out", allow_pickle=True)
    files = [base / SINGLE, *(expert / SINGLE for expert in experts)]
    acemerge.merge(files[0], files[1:], out=tmp_path / "from files", allow_pickle=True)
    assert _model_bytes(tmp_path / "out") == _model_bytes(tmp_path / "expected")
    assert _model_bytes(tmp_path / "from files") == _model_bytes(tmp_path / "expected")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        acemerge.merge(base, experts, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_shards_are_read_and_safetensors_win(plain: PlainModel) -> None:
    base, experts = plain.save()
    (base / SINGLE).write_bytes(b"no pickle at all")  # never looked at
    expected = acemerge.merge(base, experts, out=plain.root / "expected", allow_pickle=True)
    for expert in experts:
        _as_pickles(expert, shards=2)
    acemerge.merge(base, experts, out=plain.root / "out", allow_pickle=True)
    merged = open_checkpoint(plain.root / "out")
    assert expected.out is not None
    wanted = open_checkpoint(expected.out)
    assert all(_same(merged.read(name), wanted.read(name)) for name in wanted.tensors)


def test_shards_are_held_to_their_index(plain: PlainModel) -> None:
    base, _ = plain.save()
    _as_pickles(base, shards=2)
    second = base / "pytorch_model-00002-of-00002.bin"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*in the index but not in the folder"):
        open_checkpoint(base, allow_pickle=True)
    second.write_bytes(content)
    index = base / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace(second.name, "../base/" + second.name))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        open_checkpoint(base, allow_pickle=True)


# --- what is refused, and never run --------------------------------------------------------------------------


def test_pickles_are_refused_unless_asked_for(tmp_path: Path) -> None:
    path = _save(tmp_path / SINGLE, {"a": torch.zeros(2)})
    for place in (tmp_path, path):
        with pytest.raises(CheckpointError, match=r"can run code.*save_pretrained.*--allow-pickle"):
            open_checkpoint(place)
    path.rename(tmp_path / "model.safetensors")
    for allow in (False, True):
        with pytest.raises(CheckpointError, match="header of"):
            open_checkpoint(tmp_path, allow_pickle=allow)


def test_nothing_that_a_pickle_names_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stays clear of every function of torch that the same pickle would call."""
    path = _save(tmp_path / SINGLE, OrderedDict(a=nn.Parameter(torch.ones(2)), b=torch.ones(1)))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        monkeypatch.setattr(torch._utils, name, None)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(io, "open", None)
    assert open_checkpoint(path, allow_pickle=True).tensors.keys() == {"a", "b"}


# --- the command line ---------------------------------------------------------------------------------------


def test_the_option_of_the_command_line(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    from acemerge.cli.app import main

    base, experts = plain.save()
    _as_pickles(experts[0])
    words = ["plan", "--base", str(base), "--expert", str(experts[0])]
    for extra, code in (([], 3), (["--allow-pickle"], 0)):
        with pytest.raises(SystemExit) as caught:
            main(words + extra)
        assert caught.value.code == code
    assert "--allow-pickle" in capsys.readouterr().err
