"""Adapters as PEFT writes them by default, for every family: what we merge is what PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ADAPTER_FAMILIES, inputs_for, make_model, write_adapter, write_checkpoint
from peft_adapters import merged_by_peft, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import acemerge
from acemerge.checkpoints.reader import Reader
from acemerge.engine import pipeline
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError
from acemerge.recipes.recipe import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


def _saved(family: str, folder: Path) -> Path:
    make_model(family).save_pretrained(folder)
    return folder


def _loaded(family: str, folder: Path) -> Any:
    model, info = type(make_model(family)).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    return model.eval()


def _check_equal_to_peft(family: str, base: Path, adapter: Path, out: Path) -> int:
    """The number of tensors that the adapter changed."""
    acemerge.merge(base, [adapter], "average", out=out)
    wanted, before = merged_by_peft(family, base, adapter).state_dict(), _loaded(family, base).state_dict()
    found: dict[str, Tensor] = _loaded(family, out).state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    return sum(not torch.equal(value, before[name]) for name, value in found.items())


# What `all-linear` leaves out although it can have an adapter, or the other way round.
OTHERS: dict[str, dict[str, Any]] = {
    "mamba": {"target_modules": ["x_proj", "in_proj", "embeddings"]},
    "jamba": {"target_modules": ["q_proj", "in_proj", "x_proj", "out_proj"]},
}


@pytest.mark.parametrize("family", ADAPTER_FAMILIES)
def test_one_of_all_linear_layers_is_what_peft_merges(family: str, tmp_path: Path) -> None:
    base = _saved(family, tmp_path / "base")
    config = {"target_modules": "all-linear", **OTHERS.get(family, {})}
    adapter = train(make_model(family), tmp_path / "lora", r=2, lora_alpha=3, **config)
    assert _check_equal_to_peft(family, base, adapter, tmp_path / "out") >= 4


EXPERTS = {
    "qwen3_moe": "mlp.experts",
    "mixtral": "mlp.experts",
    "gpt_oss": "mlp.experts",
    "llama4": "feed_forward.experts",
    "granitemoe": "block_sparse_moe.experts",
    "jamba": "feed_forward.experts",
    "deepseek_v3": "mlp.experts",
    "qwen3_vl_moe": "mlp.experts",
}


@pytest.mark.parametrize("which", [("gate_up_proj", "down_proj"), ("down_proj",)], ids="+".join)
@pytest.mark.parametrize("family", EXPERTS)
def test_one_of_the_experts_is_what_peft_merges(family: str, which: tuple[str, ...], tmp_path: Path) -> None:
    base = _saved(family, tmp_path / "base")
    parameters = [f"{EXPERTS[family]}.{name}" for name in which]
    ranks = {r".*experts\.down_proj": 3}
    adapter = train(
        make_model(family), tmp_path / "lora", r=2, target_modules=[], target_parameters=parameters, rank_pattern=ranks
    )
    assert _check_equal_to_peft(family, base, adapter, tmp_path / "out") >= len(which)


@pytest.mark.parametrize("together", [256, 1], ids=["in batches", "one by one"])
def test_what_all_experts_share_is_read_once(together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors of a fused parameter, for each of the experts that the base has apart, in their own order."""
    base = _saved("qwen3_moe", tmp_path / "base")
    config = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapter = train(make_model("qwen3_moe"), tmp_path / "lora", r=2, **config)
    read: list[str] = []
    real = Reader.read

    def noted(self: Reader, places: Any, buffer: Any) -> Any:
        if self.checkpoint.adapter:
            read.extend(f"{place.file.name} at {place.offset}" for place in places.found)
        return real(self, places, buffer)

    monkeypatch.setattr(Reader, "read", noted)
    monkeypatch.setattr(pipeline, "_BATCH_PIECES", together)
    acemerge.merge(base, [adapter, adapter], "ace", tmp_path / "out")
    assert len(read) == 2 * len(load_file(adapter / "adapter_model.safetensors"))  # once for either expert
    assert len(set(read)) == len(read) / 2


def test_square_experts_are_turned_as_their_module_says(tmp_path: Path) -> None:
    """Where both sides are equal, shapes do not tell."""
    base = tmp_path / "base"
    make_model("gpt_oss", intermediate_size=16).save_pretrained(base)
    config = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = train(make_model("gpt_oss", intermediate_size=16), tmp_path / "lora", r=2, **config)
    assert _check_equal_to_peft("gpt_oss", base, adapter, tmp_path / "out") == 2


# --- a tied base ---------------------------------------------------------------------------------------------

TIED = {
    "qwen3": ("embed_tokens", "lm_head", "q_proj"),
    "gpt2": ("wte", "lm_head", "c_attn"),
    "bert": ("word_embeddings", "decoder", "query"),
    "bart": ("embed_tokens", "lm_head", "q_proj"),
    "t5": ("embed_tokens", "lm_head", "q"),
}


def _logits(model: Any, family: str) -> Tensor:
    logits: Tensor = model(**inputs_for(family)).logits
    return logits


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("saved", ["embedding", "head", "both"])
def test_saved_modules_of_a_tied_base(family: str, saved: str, tmp_path: Path) -> None:
    """As PEFT merges them: the copy takes the place of its module, and of nothing that is tied to that."""
    base = _saved(family, tmp_path / "base")
    embedding, head, layer = TIED[family]
    modules = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[saved]
    adapter = train(make_model(family), tmp_path / "lora", r=2, target_modules=[layer], modules_to_save=modules)
    report = acemerge.merge(base, [adapter], "average", out=tmp_path / "out")
    wanted = _logits(merged_by_peft(family, base, adapter), family)
    torch.testing.assert_close(_logits(_loaded(family, tmp_path / "out"), family), wanted, rtol=1e-5, atol=1e-5)
    assert (_logits(_loaded(family, base), family) - wanted).abs().max() > 1e-2
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert any("the output's head is apart from its embedding" in note for note in report.manifest["warnings"])


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_saved_module_and_an_update_of_what_was_tied_to_it(config: dict[str, Any], tmp_path: Path) -> None:
    base = _saved("qwen3", tmp_path / "base")
    adapter = train(make_model("qwen3"), tmp_path / "lora", r=2, **config)
    acemerge.merge(base, [adapter], "average", out=tmp_path / "out")
    wanted = _logits(merged_by_peft("qwen3", base, adapter), "qwen3")
    torch.testing.assert_close(_logits(_loaded("qwen3", tmp_path / "out"), "qwen3"), wanted, rtol=1e-5, atol=1e-5)


def test_a_tie_that_peft_was_told_to_keep_stays(tmp_path: Path) -> None:
    base = _saved("qwen3", tmp_path / "base")
    config = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = train(make_model("qwen3"), tmp_path / "lora", r=2, target_modules=["q_proj"], **config)
    assert _check_equal_to_peft("qwen3", base, adapter, tmp_path / "out") >= 3
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_beside_it_every_other_expert_has_its_own_matrix_in_both_places(tmp_path: Path) -> None:
    base = _saved("qwen3", tmp_path / "base")
    saved = train(make_model("qwen3"), tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    update = train(make_model("qwen3"), tmp_path / "b", seed=2, r=2, target_modules=["embed_tokens"])
    make_model("qwen3", seed=7).save_pretrained(tmp_path / "c")
    acemerge.merge(base, [saved, update, tmp_path / "c"], "average", out=tmp_path / "out", force=True)
    models = [merged_by_peft("qwen3", base, folder) for folder in (saved, update)] + [_loaded("qwen3", tmp_path / "c")]
    found = load_file(tmp_path / "out/model.safetensors")
    for name, own in (
        ("model.embed_tokens.weight", "get_input_embeddings"),
        ("lm_head.weight", "get_output_embeddings"),
    ):
        wanted = sum(getattr(model, own)().weight.double() for model in models) / 3
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-6)


def test_both_updates_of_one_tied_matrix_are_refused_with_a_cure_that_helps(tmp_path: Path) -> None:
    base = _saved("qwen3", tmp_path / "base")
    adapter = train(make_model("qwen3"), tmp_path / "lora", r=2, target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(
        CheckpointError, match=r"both spellings of the tied tensor .*; merge it into its base with peft"
    ):
        acemerge.merge(base, [adapter])
    merged = merged_by_peft("qwen3", base, adapter)
    merged.save_pretrained(tmp_path / "merged")
    acemerge.merge(base, [tmp_path / "merged"], "average", out=tmp_path / "out", force=True)
    wanted = _logits(merged, "qwen3")
    torch.testing.assert_close(_logits(_loaded("qwen3", tmp_path / "out"), "qwen3"), wanted, rtol=1e-5, atol=1e-5)


# --- one weight under several names --------------------------------------------------------------------------


def test_a_saved_module_under_three_names_counts_once(tmp_path: Path) -> None:
    """As PEFT writes it where the vocabulary was resized, too."""
    base = _saved("llama", tmp_path / "base")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = train(make_model("llama"), tmp_path / "lora", r=2, **config)
    file, before = adapter / "adapter_model.safetensors", load_file(base / "model.safetensors")
    tensors = load_file(file)
    for name in ("model.embed_tokens", "lm_head"):
        own = tensors[f"base_model.model.{name}.weight"]
        tensors[f"base_model.model.{name}.modules_to_save.weight"] = own.clone()
        tensors[f"base_model.model.{name}.original_module.weight"] = before[f"{name}.weight"]
    save_file(tensors, file)
    assert _check_equal_to_peft("llama", base, adapter, tmp_path / "out") == 4
    for name in ("model.embed_tokens", "lm_head"):  # as older versions of PEFT name it
        del tensors[f"base_model.model.{name}.weight"]
    save_file(tensors, file)
    acemerge.merge(base, [adapter], "average", out=tmp_path / "old")
    again, found = load_file(tmp_path / "old/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_the_base_of_a_saved_module_alone_is_no_weight_of_the_adapter(tmp_path: Path) -> None:
    base = _saved("llama", tmp_path / "base")
    adapter = train(make_model("llama"), tmp_path / "lora", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.original_module.weight": torch.ones(40, 16)}, file)
    with pytest.raises(CheckpointError, match=r"original_module\.weight' is of a kind that cannot be read"):
        acemerge.merge(base, [adapter])


# --- what cannot be known is refused ---------------------------------------------------------------------------


def test_what_a_base_ties_is_refused_where_it_is_not_known(tmp_path: Path) -> None:
    """Without an architecture nobody says which names are tied."""
    base = write_checkpoint(tmp_path / "base", {"embed_tokens.weight": torch.ones(5, 4)}, {"tie_word_embeddings": True})
    adapter = write_adapter(tmp_path / "lora", {}, modules_to_save=["embed_tokens"])
    tensors = {"base_model.model.embed_tokens.weight": torch.zeros(5, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"what its base ties to that is not known: .*; merge it into its base"):
        acemerge.merge(base, [adapter])


def test_a_copy_of_a_tied_module_on_an_expert_of_its_own_is_refused(tmp_path: Path) -> None:
    base = _saved("qwen3", tmp_path / "base")
    make_model("qwen3", seed=5).save_pretrained(tmp_path / "expert")
    adapter = train(make_model("qwen3"), tmp_path / "lora", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    recipe = {"base": str(base), "experts": [{"model": str(tmp_path / "expert"), "adapter": str(adapter)}]}
    with pytest.raises(
        CheckpointError, match=r"its adapter replaces 'lm_head\.weight', which its model ties; merge it"
    ):
        open_recipe(make_recipe(recipe), None, RunOptions())


def test_experts_of_another_number_are_another_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("qwen3_moe", num_experts=2).save_pretrained(base)
    config = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = train(make_model("qwen3_moe"), tmp_path / "lora", r=2, **config)
    with pytest.raises(CheckpointError, match=r"is of 4 experts, and the base has 2 matrices of them; name the base"):
        acemerge.merge(base, [adapter])


@pytest.mark.parametrize("parameters", [[], ["experts.down_proj"], ["experts.b", "experts.a"]], ids=str)
def test_updates_of_parameters_that_are_not_named_are_refused(parameters: list[str], tmp_path: Path) -> None:
    base = _saved("qwen3_moe", tmp_path / "base")
    config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = train(make_model("qwen3_moe"), tmp_path / "lora", r=2, **config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": parameters}))
    with pytest.raises(CheckpointError, match=r"has 2 updates, and target_parameters names \d of them"):
        acemerge.merge(base, [adapter])


# --- the whole product -----------------------------------------------------------------------------------------

FEATURES: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"(q|in|out)_proj": 3, r".*\.1\..*": 4}, "alpha_pattern": {r"^model\.layers\.0": 5}},
}


@pytest.mark.torture
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", ADAPTER_FAMILIES)
def test_every_family_with_every_feature(family: str, feature: str, tmp_path: Path) -> None:
    base = _saved(family, tmp_path / "base")
    config = {"target_modules": "all-linear", **OTHERS.get(family, {}), **FEATURES[feature]}
    adapter = train(make_model(family), tmp_path / "lora", r=2, lora_alpha=3, **config)
    assert _check_equal_to_peft(family, base, adapter, tmp_path / "out") >= 4
