"""A merge written as one LoRA adapter: what peft loads is the merge's best approximation of that rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import PlainModel, load_folder, make_model, perturb, write_adapter
from commands import failed, run
from safetensors.torch import load_file
from torch import Tensor

import acemerge
import acemerge.engine.writing
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.manifest import stored_names
from acemerge.output.verify import verify
from attacks.merging import content

UP, DOWN = "layers.0.up", "layers.0.down"


def best_of_rank(D: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def adapters_of(base: Path, root: Path, modules: list[str], rank: int = 2) -> list[Path]:
    """Two adapters; the last module is changed by the first of them alone."""
    tensors, generator = load_folder(base), torch.Generator().manual_seed(5)
    folders = []
    for t in range(2):
        factors = {}
        for module in modules[: len(modules) - t]:
            rows, columns = tensors[f"{module}.weight"].shape
            if ".h." in module:  # GPT-2 stores (in, out)
                rows, columns = columns, rows
            draws = (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
            factors[module] = draws
        folders.append(write_adapter(root / f"a{t}", factors))
    return folders


MODULES = {
    "llama": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"],
}


@pytest.mark.parametrize("rule", ["average", "ties"])  # the second must otherwise see full updates
def test_adapters_are_compressed_first_where_that_is_asked(rule: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    modules = MODULES["llama"][:2]
    experts = adapters_of(base, tmp_path, [*modules, modules[0]][:2])
    report = {
        when: acemerge.merge(base, experts, rule, tmp_path / when, as_lora=2, compress=when)
        for when in ("first", "last")
    }
    name = f"{modules[0]}.weight"
    lost = {when: found.tensors[name]["share_lost"] for when, found in report.items()}
    assert lost["first"] < 1e-6 < lost["last"]
    assert report["first"].manifest["recipe"]["compress"] == "first"
    for when in report:
        verify(tmp_path / when)


def test_what_cannot_be_compressed_first_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    experts = adapters_of(base, tmp_path, MODULES["llama"])
    with pytest.raises(UsageError, match="compress: `first` goes with as_lora"):
        acemerge.merge(base, experts, "average", tmp_path / "out", compress="first")
    with pytest.raises(UsageError, match="slerp needs more than the updates"):
        acemerge.merge(base, experts, "slerp", tmp_path / "out", as_lora=2, compress="first")
    perturb(make_model("llama"), 1).save_pretrained(tmp_path / "full")
    with pytest.raises(UsageError, match=r"not all experts have an adapter for tensor .*; use --compress last"):
        acemerge.merge(base, [experts[0], tmp_path / "full"], "average", tmp_path / "out", as_lora=2, compress="first")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["ace", "tsv_m", "ties"])
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("given", ["adapters", "full models"])
def test_peft_loads_the_best_of_the_merge(rule: str, family: str, given: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(family).save_pretrained(base)
    if given == "adapters":
        experts = adapters_of(base, tmp_path, MODULES[family])
    else:
        experts = [tmp_path / "e1", tmp_path / "e2"]
        for seed, expert in enumerate(experts):
            perturb(make_model(family), seed=seed).save_pretrained(expert)
    acemerge.merge(base, experts, rule, tmp_path / "full")
    report = acemerge.merge(base, experts, rule, tmp_path / "lora", as_lora=3)
    model = type(make_model(family)).from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    before, merged = load_folder(base), load_folder(tmp_path / "full")
    inside = report.manifest["stored"]
    assert len(inside) >= len(MODULES[family])
    energy = lost = 0.0
    for name, record in report.tensors.items():
        M = merged[name].double() - before[name].double()
        kept = best_of_rank(M, 3) if name in inside else torch.zeros_like(M)
        torch.testing.assert_close(loaded[name].double(), before[name].double() + kept, rtol=0, atol=2e-6)
        share = ((M - kept).norm() / M.norm()).square().item()
        assert record["share_lost"] == pytest.approx(share, rel=1e-3, abs=1e-9)
        energy, lost = energy + M.square().sum().item(), lost + (M - kept).square().sum().item()
    assert report.manifest["share_lost"] == pytest.approx(lost / energy, rel=1e-3)
    assert lost / energy > 1e-3  # the case is not an empty one
    assert {name for name in before if not torch.equal(loaded[name], before[name])} == set(inside)


def test_with_the_rank_of_the_merge_nothing_is_lost(plain: PlainModel) -> None:
    base, _ = plain.save()
    adapters = adapters_of(base, plain.root, [UP, DOWN], rank=1)
    acemerge.merge(base, adapters, "ace", plain.root / "full")
    report = acemerge.merge(base, adapters, "ace", plain.root / "lora", as_lora=5)
    assert report.manifest["share_lost"] < 1e-12
    acemerge.merge(base, [plain.root / "lora"], "average", plain.root / "again")
    for name, value in load_folder(plain.root / "full").items():
        torch.testing.assert_close(load_folder(plain.root / "again")[name], value, rtol=0, atol=1e-6)
    assert (
        load_file(plain.root / "lora/adapter_model.safetensors")[f"base_model.model.{UP}.lora_A.weight"].shape[0] == 5
    )


def test_the_command_says_what_is_lost(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    words = ["--base", base, "--expert", experts[0], "--expert", experts[1], "--as-lora", "2"]
    code, said, _ = run(capsys, "plan", *words)
    assert code == 0
    assert "an embedding: a token Gram is no input covariance; not in the adapter" in said
    out = plain.root / "out"
    run(capsys, "merge", *words[:-2], "-o", out)  # a model, which the adapter takes the place of
    code, said, _ = run(capsys, "merge", *words, "-o", out, "--overwrite")
    assert code == 0
    manifest = verify(out)
    assert f"adapter of 2 layers, rank 2, {manifest['share_lost']:.2%} of the energy lost in all" in said
    lost = [name for name, record in manifest["tensors"].items() if record["share_lost"] == 1]
    assert f"3 tensors changed that a LoRA of linear layers cannot hold, all of it lost: {', '.join(lost)}" in said
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "merge.svg", "acemerge.json"
    }  # fmt: skip
    assert load_file(out / "adapter_model.safetensors").keys() == stored_names(manifest)
    assert manifest["recipe"]["as_lora"] == 2
    card = (out / "README.md").read_text()
    assert "# LoRA adapter of rank 2, merged from 2 experts by kron_auto" in card
    assert f"It lacks {manifest['share_lost']:.2%} of the merged update's energy." in card
    assert "PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)" in card


def test_factors_are_rounded_to_the_type_that_is_asked_for(plain: PlainModel) -> None:
    base, experts = plain.save()
    for dtype in ("auto", "bfloat16"):
        acemerge.merge(base, experts, "iso_c", plain.root / dtype, as_lora=3, dtype=dtype)
    wide, short = (load_file(plain.root / d / "adapter_model.safetensors") for d in ("auto", "bfloat16"))
    assert all(value.dtype == torch.float32 for value in wide.values())
    assert all(torch.equal(short[name], value.bfloat16()) for name, value in wide.items())


def test_layers_that_no_expert_moved_are_zeros(plain: PlainModel) -> None:
    for tuned in plain.tuned:
        tuned[f"{UP}.weight"] = plain.base[f"{UP}.weight"]
    base, experts = plain.save()
    report = acemerge.merge(base, experts, "ace", plain.root / "out", as_lora=2)
    stored = load_file(plain.root / "out/adapter_model.safetensors")
    assert not any(stored[name].any() for name in report.manifest["stored"][f"{UP}.weight"])
    record = report.tensors[f"{UP}.weight"]
    assert (record["status"], record["energy"], record["share_lost"]) == ("no update", 0, 0)


@pytest.mark.parametrize("done", [1, 2, 4])
def test_an_interrupted_one_is_gone_on_with(done: int, plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, "ace", plain.root / "whole", as_lora=2)
    real, count = acemerge.engine.writing.TensorFiles.end_of_tensor, 0

    def end_of_tensor(self: Any, names: Any) -> Any:
        nonlocal count
        count += 1
        if count > done:
            raise KeyboardInterrupt
        return real(self, names)

    monkeypatch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
    monkeypatch.setattr(acemerge.engine.writing.TensorFiles, "end_of_tensor", end_of_tensor)
    with pytest.raises(KeyboardInterrupt):
        acemerge.merge(base, experts, "ace", plain.root / "out", as_lora=2)
    monkeypatch.setattr(acemerge.engine.writing.TensorFiles, "end_of_tensor", real)
    with pytest.raises(UsageError, match="as_lora was 2 and is 3"):
        acemerge.merge(base, experts, "ace", plain.root / "out", as_lora=3, resume=True)
    acemerge.merge(base, experts, "ace", plain.root / "out", as_lora=2, resume=True)
    assert content(plain.root / "out") == content(plain.root / "whole")


def test_heads_are_kept_beside(plain: PlainModel) -> None:
    plain.tuned[0]["score.weight"] = torch.ones(2, 6)
    base, experts = plain.save()
    acemerge.merge(base, experts, "ace", plain.root / "out", as_lora=2)
    assert load_file(plain.root / "out/heads/e1.safetensors").keys() == {"score.weight"}
    assert verify(plain.root / "out")


def test_what_cannot_be_an_adapter_is_refused(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    out = plain.root / "out"
    words = ["merge", "--base", base, "--expert", experts[0], "-o", out, "--as-lora"]
    failed(run(capsys, *words, "0"), 2, "as_lora.*greater than or equal to 1, not '0'")
    failed(run(capsys, *words, "2", "--method", "emr"), 2, "emr writes masks beside a model")
    failed(run(capsys, *words, "2", "--vocabulary", "base"), 2, "an adapter holds no vocabulary")
    with pytest.raises(CheckpointError, match="has no linear layer that the experts change"):
        acemerge.merge(base, experts, "ace", out, as_lora=2, rules=[{"match": "layers.*.weight", "action": "base"}])
    assert not out.exists()
