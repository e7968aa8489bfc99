"""Paths that are almost a model's: what is there is said, and what to name instead is a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_adapter, write_checkpoint

import acemerge
from acemerge.checkpoints.lora import open_expert
from acemerge.errors import CheckpointError
from acemerge.output.verify import verify

COMMIT = "0123456789" * 4


def _trainer(root: Path, plain: PlainModel) -> None:
    for step in (500, 1000, 90):
        write_checkpoint(root / f"checkpoint-{step}", plain.base)
    (root / "training_args.bin").write_bytes(b"")


def _adapters(root: Path, plain: PlainModel) -> None:
    for name in ("code", "math"):
        write_adapter(root / name, {"layers.0.up": (torch.zeros(2, 6), torch.zeros(8, 2))})


def _renamed(root: Path, plain: PlainModel) -> None:
    write_checkpoint(root, plain.base)
    (root / "model.safetensors").rename(root / "consolidated.safetensors")


# What lies in a folder; what is said of it; and what it says to name, if that can be opened.
FOUND = {
    "trainer": (_trainer, "checkpoint-90, checkpoint-500, checkpoint-1000", "checkpoint-1000"),
    "cache": (lambda root, plain: write_checkpoint(root / "snapshots" / COMMIT, plain.base), "revision", COMMIT),
    "adapters": (_adapters, "the adapter.* code, math|adapter of its own, but code, math", "code"),
    "renamed": (_renamed, "has consolidated.safetensors, and no model", "consolidated.safetensors"),
    "below": (lambda root, plain: write_checkpoint(root / "llm", plain.base), "has a model in llm", "llm"),
}
FILES = {
    "fsdp": ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights .*/pytorch_model_fsdp_0 NEW_FOLDER"),
    "distributed": ("__0_0.distcp", "accelerate merge-weights .*/distributed/ NEW_FOLDER"),
    "deepspeed": ("global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"),
    "gguf": ("llama-q4.gguf", "has llama-q4.gguf, whose weights are quantised"),
    "flax": ("flax_model.msgpack", "no weights of PyTorch"),
    "shards": ("consolidated-00001-of-00002.safetensors", "no index of shards of these names"),
    "nothing": ("notes.txt", "has neither model.safetensors nor"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_is_there_can_be_opened_as_it_is_said(what: str, plain: PlainModel) -> None:
    put, said, inner = FOUND[what]
    put(plain.root / what, plain)
    with pytest.raises(CheckpointError, match=said) as refused:
        open_expert(plain.root / what)
    named = refused.value.cure.split()[-1]
    assert named.endswith(inner)
    assert open_expert(Path(named)).tensors


@pytest.mark.parametrize("what", FILES)
def test_what_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    file, said = FILES[what]
    (tmp_path / what / file).parent.mkdir(parents=True)
    (tmp_path / what / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=said):
        open_expert(tmp_path / what)


def test_a_single_file_is_a_model(plain: PlainModel) -> None:
    base, experts = plain.save()
    single = [plain.root / name for name in ("sd.safetensors", "anime.safetensors", "photo.safetensors")]
    for folder, file in zip((base, *experts), single, strict=False):
        (folder / "model.safetensors").rename(file)
    acemerge.merge(single[0], single[1:], "average", out=plain.root / "out")
    merged = load_folder(plain.root / "out")
    assert merged.keys() == plain.base.keys()
    name = "layers.0.up.weight"
    torch.testing.assert_close(merged[name], (plain.tuned[0][name] + plain.tuned[1][name]) / 2)
    assert verify(plain.root / "out")["experts"] == ["anime.safetensors", "photo.safetensors"]


def test_a_part_of_a_model_is_no_model(plain: PlainModel) -> None:
    for name, said in (
        ("model-00001-of-00002.safetensors", "is one of 2 shards of a model; name its folder"),
        ("adapter_model.safetensors", "is an adapter without its adapter_config.json; name its folder"),
    ):
        write_checkpoint(plain.root / "parts", plain.base)
        (plain.root / "parts" / "model.safetensors").rename(plain.root / "parts" / name)
        with pytest.raises(CheckpointError, match=said):
            open_expert(plain.root / "parts" / name)
