"""The SHA-256 of every tensor that was read, in the manifest: the file's own bytes, once, however they were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, write_adapter, write_checkpoint, write_sharded
from hashes import stored_hashes, tensors_read
from torch import Tensor

import acemerge
from acemerge.checkpoints import files, reader
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.reader import Reader, Span
from acemerge.output.manifest import load_manifest, to_bytes
from acemerge.planning import pieces

WEIGHTS = "model.safetensors"


def hashes_of(folder: Path) -> dict[str, str]:
    return {name: sum for file in sorted(folder.glob("*.safetensors")) for name, sum in stored_hashes(file).items()}


def many_rows(root: Path, models: int) -> list[Path]:
    """Models with a layer of many rows, in shards."""
    made = []
    for i in range(models):
        torch.manual_seed(i)
        shards = [{"layers.0.up.weight": torch.randn(40, 6)}, {"layers.1.up.weight": torch.randn(6, 6).half()}]
        made.append(write_sharded(root / str(i), shards))
    return made


@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("in_rows", [False, True])
def test_every_tensor_once_however_often_it_is_read(
    method: str, in_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_rows:
        monkeypatch.setattr(pieces, "_PIECE", 60)
    models = many_rows(tmp_path, 3)
    report = acemerge.merge(models[0], models[1:], method, out=tmp_path / "out", force=True)
    assert tensors_read(report.manifest) == [hashes_of(model) for model in models]


@pytest.mark.parametrize("at_once", [1, 7, 100, 244])
def test_what_is_hashed_in_parts_is_read_whole(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end within tensors, at their ends, and behind several."""
    monkeypatch.setattr(reader, "IN_CACHE", at_once)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(11), "b": torch.randn(5, 10), "c": torch.zeros(0, 3), "d": torch.randn(3)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors))
    found = Reader(checkpoint, hashing=True)
    names = sorted(tensors)
    places = found.places([Span(name) for name in names])
    stored = found.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
    for name, values in zip(names, stored, strict=True):
        assert torch.equal(values.tensor(), tensors[name]), name
    (read,) = found.hashes().values()
    assert {name: hashed.sha256 for name, hashed in read.tensors.items()} == {
        name: sum for name, sum in hashes_of(tmp_path / "m").items() if name != "c"
    }


def test_what_no_rule_wants_is_not_listed_and_heads_are(plain: PlainModel) -> None:
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    base, experts = plain.save()
    rules = [{"match": "layers.0.*", "action": "base"}]
    report = acemerge.merge(base, experts, "average", out=plain.root / "out", rules=rules)
    of_base, *of_experts = tensors_read(report.manifest)
    assert of_base == hashes_of(base)
    kept = {name for name in of_base if name.startswith("layers.0.")}
    for found, expert in zip(of_experts, experts, strict=True):
        expected = hashes_of(expert)
        assert kept
        assert found == {name: sum for name, sum in expected.items() if name not in kept}
    assert "score.weight" in of_experts[0]


def test_an_adapters_factors_as_its_file_names_and_stores_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = write_checkpoint(tmp_path / "base", {"layers.0.up.weight": torch.randn(8, 6), "norm": torch.ones(6)})
    factors = {"layers.0.up": (torch.randn(2, 6).half(), torch.randn(8, 2).half())}
    adapter = write_adapter(tmp_path / "lora", factors)
    of_base, of_adapter = tensors_read(acemerge.merge(base, [adapter], out=tmp_path / "out").manifest)
    assert of_base == hashes_of(base)
    assert of_adapter == stored_hashes(adapter / "adapter_model.safetensors")


def test_a_resumed_run_knows_what_was_read_before_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
    models = many_rows(tmp_path, 3)
    real, done = acemerge.engine.execute.TensorFiles.end_of_tensor, []

    def stopped(self: Any, names: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(names)
        return real(self, names)

    options: dict[str, Any] = {"out": tmp_path / "out", "max_shard_size": "1KB", "force": True}
    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.execute.TensorFiles, "end_of_tensor", stopped)
        with pytest.raises(KeyboardInterrupt):
            acemerge.merge(models[0], models[1:], "average", **options)
    read: list[str] = []
    places = Reader.places
    monkeypatch.setattr(
        Reader, "places", lambda self, spans: read.extend(span.name for span in spans) or places(self, spans)
    )
    report = acemerge.merge(models[0], models[1:], "average", resume=True, **options)
    assert set(read) < set(hashes_of(models[0]))
    assert tensors_read(report.manifest) == [hashes_of(model) for model in models]


def test_whole_files_are_hashed_when_asked_for(plain: PlainModel) -> None:
    base, experts = plain.save()
    plainly = acemerge.merge(base, experts, "average", out=plain.root / "plainly")
    asked = acemerge.merge(base, experts, "average", out=plain.root / "asked", hash_files=True)
    inputs = asked.manifest["inputs"], plainly.manifest["inputs"], (base, *experts)
    for entry, other, folder in zip(*inputs, strict=True):
        assert entry["files"][WEIGHTS].pop("sha256") == files.sha256(folder / WEIGHTS)
        assert entry == other


def test_a_line_for_each_tensor_and_older_manifests_are_read(plain: PlainModel, tmp_path: Path) -> None:
    base, experts = plain.save()
    report = acemerge.merge(base, experts, "average", out=plain.root / "out")
    lines = (plain.root / "out" / "acemerge.json").read_text().splitlines()
    for sum in (sum for model in tensors_read(report.manifest) for sum in model.values()):
        (line,) = {line for line in lines if sum in line and line.count(sum) == 1 and len(line) < 140}
        assert json.loads(f"{{{line.rstrip('},')}}}")
    older = {**load_manifest(plain.root / "out")}
    older["inputs"] = [
        {"path": entry["path"], "files": {name: {"sha256": "0" * 64, "bytes": 7} for name in entry["files"]}}
        for entry in older["inputs"]
    ]
    (tmp_path / "acemerge.json").write_bytes(to_bytes(older))
    assert load_manifest(tmp_path)["inputs"] == older["inputs"]
    assert to_bytes(older).splitlines()[5].startswith(b'"inputs": [{"path": ')


def test_values_in_fp8_are_hashed_as_they_are_stored(tmp_path: Path) -> None:
    stored: dict[str, Tensor] = {
        "layers.0.up.weight": torch.randn(4, 6).to(torch.float8_e4m3fn),
        "layers.0.up.weight_scale": torch.ones(4, 1),
    }
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    folder = write_checkpoint(tmp_path / "fp8", stored, config)
    report = acemerge.merge(folder, [folder], "average", out=tmp_path / "out", dequantize=True)
    assert tensors_read(report.manifest)[0] == hashes_of(folder)
