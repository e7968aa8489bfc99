"""Adapters made of full fine-tunes: the best of their rank, loadable by peft, and honest about what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from builders import PlainModel, load_folder, make_model, perturb, write_adapter, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

import acemerge
from acemerge.cli.app import main
from acemerge.errors import CheckpointError, UsageError
from acemerge.extract import extract_lora
from acemerge.linalg.lowrank import best_factors
from acemerge.output.manifest import stored_names
from acemerge.output.verify import verify


def best_of_rank(D: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_factors_are_the_best_and_balanced(shape: tuple[int, int], rank: int) -> None:
    D = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    B, A, lost = best_factors(D, rank)
    assert len(A) == B.shape[1] == min(rank, *shape)
    best = best_of_rank(D, rank)
    torch.testing.assert_close((B @ A).double(), best, rtol=0, atol=2e-6)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-5)
    assert lost == pytest.approx((D - best).square().sum().item() / D.square().sum().item(), rel=1e-5, abs=1e-12)


def test_no_difference_has_no_factors() -> None:
    B, A, lost = best_factors(torch.zeros(4, 3), 2)
    assert (B.shape, A.shape, lost) == ((4, 0), (0, 3), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_peft_loads_it(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "base")
    perturb(make_model(family), seed=3).save_pretrained(tmp_path / "tuned")
    report = extract_lora(tmp_path / "tuned", tmp_path / "base", 3, tmp_path / "out")
    model = type(make_model(family)).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    base, tuned = load_folder(tmp_path / "base"), load_folder(tmp_path / "tuned")
    inside = report.manifest["stored"]
    assert len(inside) >= 8
    energy = lost = 0.0
    for name, record in report.tensors.items():
        W0, D = base[name].double(), tuned[name].double() - base[name].double()
        kept = best_of_rank(D, 3) if name in inside else torch.zeros_like(D)
        torch.testing.assert_close(merged[name].double(), W0 + kept, rtol=0, atol=1e-6)
        assert record["energy"] == pytest.approx(D.square().sum().item(), rel=1e-5)
        assert record["share_lost"] == pytest.approx(((D - kept).norm() / D.norm()).square().item(), rel=1e-4)
        energy, lost = energy + D.square().sum().item(), lost + (D - kept).square().sum().item()
    assert report.tensors.keys() == base.keys()
    assert report.manifest["share_lost"] == pytest.approx(lost / energy, rel=1e-4)


def test_at_full_rank_merging_it_gives_the_layers_back(plain: PlainModel) -> None:
    base, experts = plain.save()
    extract_lora(experts[0], base, 8, plain.root / "adapter")
    acemerge.merge(base, [plain.root / "adapter"], method="average", out=plain.root / "out")
    found = load_folder(plain.root / "out")
    for name, value in found.items():
        linear = name in ("layers.0.up.weight", "layers.0.down.weight")
        torch.testing.assert_close(value, (plain.tuned[0] if linear else plain.base)[name], rtol=0, atol=1e-6)


def test_the_command_says_what_is_lost(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    write_checkpoint(experts[0], plain.tuned[0] | {"score.weight": torch.ones(2, 6)})
    out = plain.root / "adapter"
    arguments = ["extract-lora", str(experts[0]), "--base", str(base), "--rank", "2", "-o", str(out)]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    manifest = verify(out)
    assert f"adapter of 2 layers, rank 2, {manifest['share_lost']:.2%} of the energy lost in all" in said
    assert "score.weight is not in the adapter: kept in heads/e1.safetensors" in said
    lost = [name for name, record in manifest["tensors"].items() if record["share_lost"] == 1]
    assert f"3 tensors changed that a LoRA of linear layers cannot hold, all of it lost: {', '.join(lost)}" in said
    assert load_file(out / "adapter_model.safetensors").keys() == stored_names(manifest)
    assert load_file(out / "heads/e1.safetensors").keys() == {"score.weight"}
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == ["layers.0.down", "layers.0.up"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2  # the folder is not empty
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--overwrite", "--quiet"])
    assert stop.value.code == 0
    assert not list(out.glob("*.partial"))


def test_an_altered_adapter_does_not_verify(plain: PlainModel) -> None:
    base, experts = plain.save()
    extract_lora(experts[0], base, 2, plain.root / "adapter")
    config = plain.root / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 3'))
    with pytest.raises(CheckpointError, match="was altered"):
        verify(plain.root / "adapter")


def test_a_head_that_is_tied_to_an_embedding_is_no_layer(tmp_path: Path) -> None:
    """Under whichever of its names it is stored."""
    for seed in (0, 1):
        model = perturb(make_model("qwen3"), seed=seed)
        tensors = {n: v for n, v in model.state_dict().items() if n != "model.embed_tokens.weight"}
        write_checkpoint(
            tmp_path / str(seed), tensors, model.config.to_dict() | {"architectures": [type(model).__name__]}
        )
    report = extract_lora(tmp_path / "1", tmp_path / "0", 2, tmp_path / "out")
    assert "lm_head.weight" not in report.manifest["stored"]
    assert report.tensors["lm_head.weight"]["share_lost"] == 1


def test_what_cannot_be_extracted_is_refused(plain: PlainModel) -> None:
    base, experts = plain.save()
    out = plain.root / "out"
    with pytest.raises(UsageError, match="0 is not a rank"):
        extract_lora(experts[0], base, 0, out)
    adapter = write_adapter(plain.root / "a", {"layers.0.up": (torch.ones(2, 6), torch.ones(8, 2))})
    with pytest.raises(CheckpointError, match="is an adapter already"):
        extract_lora(adapter, base, 2, out)
    plain.tuned[0]["layers.0.up.weight"][1, 2] = torch.nan
    write_checkpoint(experts[0], plain.tuned[0])
    with pytest.raises(CheckpointError, match=r"'layers\.0\.up\.weight' is nan at \[1, 2\]"):
        extract_lora(experts[0], base, 2, out)
    assert not out.exists()
