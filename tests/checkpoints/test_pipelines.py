"""Diffusers pipelines: every component merged under its own name, one manifest, everything else the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from commands import failed, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import acemerge
from acemerge.checkpoints.weight_files import needed_files
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.verify import verify
from attacks.merging import snapshot

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "unet/diffusion_pytorch_model.safetensors": {
        "conv_in.weight": (4, 3, 3, 3),
        "mid_block.attentions.0.to_q.weight": (8, 6),
        "mid_block.attentions.0.to_q.bias": (8,),
    },
    "vae/diffusion_pytorch_model.safetensors": {"decoder.conv_out.weight": (3, 4, 3, 3)},
    "text_encoder_2/model.safetensors": {
        "text_model.embeddings.token_embedding.weight": (10, 6),
        "text_model.encoder.layers.0.mlp.fc1.weight": (12, 6),
    },
}
BESIDE = (
    *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder_2/config.json"),
    *("scheduler/scheduler_config.json", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"),
)


def _write(folder: Path, seed: int) -> Path:
    base, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=base) + bool(seed) * 0.1 * torch.randn(shape, generator=moved)

    for file, shapes in SHAPES.items():
        (folder / file).parent.mkdir(parents=True)
        save_file({name: tensor(shape) for name, shape in shapes.items()}, folder / file)
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"of": folder.name}))
    (folder / "unet/pipeline.py").write_text("raise SystemExit")
    return folder


def _tensors(folder: Path) -> dict[str, Tensor]:
    """As diffusers names its files: single ones."""
    return {f"{file} {name}": value for file in SHAPES for name, value in load_file(folder / file).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [_write(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))]


@pytest.mark.parametrize("method", ["task_arithmetic", "ace"])
def test_components_are_merged_each_in_its_folder(method: str, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    base, a, b = map(_tensors, models)
    acemerge.merge(models[0], models[1:], method, out)
    found = _tensors(out)
    for name, value in found.items():
        deltas = torch.stack([a[name] - base[name], b[name] - base[name]])
        linear = any(part in name for part in ("to_q.weight", "fc1.weight"))
        merged = acemerge.merge_deltas(deltas, method if linear else "average")
        torch.testing.assert_close(value, base[name] + merged.delta, rtol=1e-5, atol=1e-5, msg=name)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {*SHAPES, *BESIDE, "acemerge.json", "README.md", "merge.svg"}
    assert all((out / name).read_bytes() == (models[0] / name).read_bytes() for name in BESIDE)
    assert set(verify(out)["outputs"]) == files - {"acemerge.json"}


def test_shards_are_read(models: list[Path], tmp_path: Path) -> None:
    acemerge.merge(models[0], models[1:], "average", tmp_path / "whole")
    for folder in models:
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        tensors, places = load_file(file), {}
        for i, name in enumerate(tensors, 1):
            places[name] = f"diffusion_pytorch_model-{i:05d}-of-{len(tensors):05d}.safetensors"
            save_file({name: tensors[name]}, file.with_name(places[name]))
        file.with_name(file.name + ".index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        file.unlink()
    acemerge.merge(models[0], models[1:], "average", tmp_path / "parts")
    whole, parts = _tensors(tmp_path / "whole"), _tensors(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_over_an_earlier_output_and_beside_the_users_own(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "vae").mkdir(parents=True)
    (out / "vae/notes.txt").write_text("mine")
    acemerge.merge(models[0], models[1:], "average", out, overwrite=True)
    first = snapshot(out)
    assert acemerge.merge(models[0], models[1:], "average", out, resume=True).was_complete
    acemerge.merge(models[0], models[1:], "task_arithmetic", out, overwrite=True)
    assert (out / "vae/notes.txt").read_text() == "mine"
    changed = {name for name, content in snapshot(out).items() if content != first.get(name)}
    assert {*SHAPES, "acemerge.json"} - changed == {"vae/diffusion_pytorch_model.safetensors"}  # no linear layer
    assert len(snapshot(out)) == len(first)
    (out / "unet/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"unet/config\.json: (was altered|has another size)"):
        verify(out)


def test_a_folder_of_the_user_that_is_called_as_a_component(models: list[Path], tmp_path: Path) -> None:
    """In the place of a pipeline it is not written over; beside an ordinary output it is nobody's."""
    out = tmp_path / "out"
    shutil.copytree(models[0] / "unet", out / "unet")
    mine = snapshot(out)
    single = [folder / "unet/diffusion_pytorch_model.safetensors" for folder in models]
    acemerge.merge(single[0], single[1:], "average", out, overwrite=True)
    acemerge.merge(single[0], single[1:], "task_arithmetic", out, overwrite=True)
    assert snapshot(out).items() >= mine.items()
    verify(out)
    other = shutil.copytree(models[0], tmp_path / "other")
    with pytest.raises(UsageError, match="which no merge has written"):
        acemerge.merge(models[0], models[1:], "average", other, overwrite=True)
    assert snapshot(other) == snapshot(models[0])
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "unet").symlink_to(other / "unet")
    with pytest.raises(UsageError, match="is a link"):
        acemerge.merge(models[0], models[1:], "average", linked, overwrite=True)


def test_what_is_wrong_is_said(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--base", models[0], "--expert", models[1]]
    failed(run(capsys, *words, "--as-lora", "2"), 3, "has no linear layer .* could hold; leave --as-lora out")
    (models[1] / "unet/diffusion_pytorch_model.safetensors").rename(
        models[1] / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    failed(run(capsys, *words), 3, "its component unet has no diffusion_pytorch_model.safetensors; save it again")
    shutil.rmtree(models[1] / "unet")
    failed(run(capsys, *words), 3, "lacks tensor 'unet/")
    (models[0] / "upscaler").mkdir()
    save_file({"x": torch.ones(1)}, models[0] / "upscaler/model.safetensors")
    failed(run(capsys, *words), 3, "has weights in upscaler, which is no component that is known here; merge what")
    failed(run(capsys, "plan", "--base", models[2], "--expert", models[2] / "vae/config.json"), 3, "not a folder")


def test_of_the_hub_it_is_to_be_fetched_first() -> None:
    with pytest.raises(
        CheckpointError, match=r"diffusers pipeline.* hf download org/sd --local-dir FOLDER, and name that"
    ):
        needed_files("org/sd", [*BESIDE, *SHAPES], allow_pickle=False)
