"""What is published: complete, verified, and never half a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint
from hashes import stored_hashes, tensors_read

import acemerge
from acemerge.checkpoints import files
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.manifest import to_bytes
from acemerge.output.verify import verify


@pytest.fixture
def out(plain: PlainModel) -> Path:
    """A published output with a head, a config and two shards."""
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    base, experts = plain.save()
    (base / "config.json").write_text('{"architectures": ["Nobody"]}')
    (base / "tokenizer.json").write_text("{}")
    acemerge.merge(base, experts, "ace", out=plain.root / "out", max_shard_size="400B")
    return plain.root / "out"


def _snapshot(folder: Path) -> dict[str, bytes]:
    """The content of a folder, but for a lock file: one that could not be removed is free and does no harm."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".acemerge.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_output_is_complete_and_verifies(out: Path) -> None:
    files_there = set(_snapshot(out))
    manifest = verify(out)
    assert files_there == {*manifest["outputs"], "acemerge.json"}
    assert {"config.json", "tokenizer.json", "README.md", "heads/e1.safetensors"} <= files_there
    assert manifest["tensors"].keys() == load_folder(out).keys()
    assert all({"role", "rule", "reason", "status", "seconds"} <= set(r) for r in manifest["tensors"].values())
    by_ace = manifest["tensors"]["layers.0.up.weight"]
    assert {"gamma", "branch", "energies", "eps", "condition", "rank"} <= set(by_ace)
    assert tensors_read(manifest)[0] == stored_hashes(out.parent / "base" / "model.safetensors")


def test_the_model_card_names_base_experts_and_recipe(out: Path) -> None:
    card = (out / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert all(name in card for name in ("name: ace", "`base`", "`e1`", "`e3`", "from_pretrained", "heads/"))


def test_verify_finds_any_flipped_bit(out: Path) -> None:
    rng = random.Random(0)
    paths = [path for path in out.rglob("*") if path.is_file()]
    for trial in range(500):
        path = paths[trial % len(paths)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify(out)
        path.write_bytes(good)
    verify(out)


@pytest.mark.parametrize("name", ["heads/evil.safetensors", "model.safetensors", "tokenizer_config.json"])
def test_verify_finds_a_file_too_many(out: Path, name: str) -> None:
    (out / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not in the manifest"):
        verify(out)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"/etc/passwd": {"sha256": "0", "bytes": 1}}},
        {"outputs": {"../base/model.safetensors": {"sha256": "0", "bytes": 1}}},
        {"outputs": {}},
        {"outputs": []},
        {"tensors": 3},
        {"heads": {"e1": 2}},
    ],
    ids=str,
)
def test_verify_trusts_no_manifest_however_well_signed(out: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((out / "acemerge.json").read_text())
    outputs = change.get("outputs")
    if outputs:
        change = {"outputs": manifest["outputs"] | outputs}
    (out / "acemerge.json").write_bytes(to_bytes({**manifest, **change}))
    with pytest.raises(CheckpointError, match=r"leaves the folder|not in the manifest|is malformed"):
        verify(out)


@pytest.mark.parametrize(
    "name", ["README.md", "acemerge.json", "heads/e1.safetensors", "model-00001-of-00003.safetensors"]
)
def test_verify_finds_a_missing_file(out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(CheckpointError):
        verify(out)


def test_verify_finds_values_that_are_not_finite_even_if_hashed(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out")
    weights = load_folder(plain.root / "out")
    weights["layers.0.up.weight"][1, 2] = float("nan")
    write_checkpoint(plain.root / "out", weights)
    manifest = json.loads((plain.root / "out" / "acemerge.json").read_text())
    path = plain.root / "out" / "model.safetensors"
    manifest["outputs"][path.name] = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    (plain.root / "out" / "acemerge.json").write_bytes(to_bytes(manifest))
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight' is nan at \[1, 2\]"):
        verify(plain.root / "out")


def test_an_output_is_never_replaced_unasked(out: Path) -> None:
    base, experts = out.parent / "base", [out.parent / "e1"]
    before = _snapshot(out)
    with pytest.raises(UsageError, match=r"holds a finished merge; .*--overwrite"):
        acemerge.merge(base, experts, out=out)
    assert _snapshot(out) == before
    acemerge.merge(base, experts, out=out, overwrite=True, method="average")
    verify(out)
    assert not list(out.glob("model-*"))


def test_a_folder_with_other_things_is_left_alone(plain: PlainModel) -> None:
    base, experts = plain.save()
    (plain.root / "mine").mkdir()
    (plain.root / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        acemerge.merge(base, experts, out=plain.root / "mine")
    acemerge.merge(base, experts, out=plain.root / "mine", overwrite=True)
    assert (plain.root / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("place", ["base", "base/inside", "e2", "."])
def test_the_output_stays_apart_from_the_inputs(plain: PlainModel, place: str) -> None:
    base, experts = plain.save()
    with pytest.raises(UsageError, match="same folder as, inside or around the input"):
        acemerge.merge(base, experts, out=plain.root / place, overwrite=True)


def test_links_and_files_are_no_output(plain: PlainModel) -> None:
    base, experts = plain.save()
    (plain.root / "real").mkdir()
    (plain.root / "link").symlink_to(plain.root / "real")
    (plain.root / "file").write_text("x")
    with pytest.raises(UsageError, match="is a link"):
        acemerge.merge(base, experts, out=plain.root / "link", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        acemerge.merge(base, experts, out=plain.root / "file", overwrite=True)
