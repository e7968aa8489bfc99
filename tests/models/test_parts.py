"""Experts that are one part of their base: merged where they are, no say elsewhere; a torn file stays an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import load_folder, make_model, perturb
from safetensors.torch import save_file
from torch import Tensor

import acemerge
from acemerge.errors import CheckpointError

TEXT, VISION = "language_model.", "vision_tower."  # of the base's names


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A tiny Llava; a full expert, two of its language model, one of that without a head, one of its vision tower."""
    base = make_model("llava")
    found = {"base": base, "full": perturb(make_model("llava"), 1)}
    for seed, name in ((2, "text"), (3, "text2")):
        text = transformers.LlamaForCausalLM(base.config.text_config)
        text.model.load_state_dict(base.model.language_model.state_dict())
        text.lm_head.load_state_dict(base.lm_head.state_dict())
        found[name] = perturb(text, seed)
    found["body"] = found["text"].model
    vision = transformers.CLIPVisionModel(base.config.vision_config)
    vision.load_state_dict(base.model.vision_tower.state_dict())
    found["vision"] = perturb(vision, 4)
    for name, model in found.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in found}


def _merge(models: dict[str, Path], *names: str, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    out = models["base"].parent / "-".join(["out", *names])
    report = acemerge.merge(models["base"], [models[name] for name in names], out=out, **options)
    return dict(report.manifest), load_folder(out)


def _close(value: Tensor, *of_experts: Tensor) -> None:
    mean = torch.stack([each.double() for each in of_experts]).mean(0)
    torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_each_part_is_merged_of_those_that_have_it(models: dict[str, Path]) -> None:
    manifest, merged = _merge(models, "full", "text", "vision", method="average")
    full, text, vision = (load_folder(models[name]) for name in ("full", "text", "vision"))
    assert merged.keys() == full.keys()
    for name, value in merged.items():
        if name.startswith(TEXT):
            _close(value, full[name], text[name.removeprefix(TEXT)])
        elif name.startswith(VISION):
            _close(value, full[name], vision[name.removeprefix(VISION)])
        else:
            _close(value, full[name])
    assert [w for w in manifest["warnings"] if "alone" in w] == [
        "expert text: is the base's model.language_model alone; 43 tensors are merged without it",
        "expert vision: is the base's model.vision_tower alone; 25 tensors are merged without it",
    ]
    record = manifest["tensors"]["multi_modal_projector.linear_1.weight"]
    assert record["reason"] == "a linear layer's weight, without text, vision"
    assert record["skipped_experts"] == ["text", "vision"]
    out = models["base"].parent / "out-full-text-vision"
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.isfinite(model(input_ids=torch.arange(6)[None]).logits).all()


@pytest.mark.parametrize("method", ["ace", "ties", "emr", "slerp"])
def test_a_rule_sees_the_experts_that_have_the_part(models: dict[str, Path], method: str) -> None:
    _, merged = _merge(models, "full", "text", method=method)
    _, alone = _merge(models, "full", method=method)
    if method != "ties":  # whose thresholds are of whole models
        for name in (name for name in merged if not name.startswith(TEXT)):
            torch.testing.assert_close(merged[name], alone[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, alone[name]) for name, value in merged.items() if name.startswith(TEXT))
    if method == "emr":
        out = models["base"].parent / "out-full-text"
        name = TEXT + "model.layers.0.mlp.up_proj.weight"
        found = acemerge.expert_weights(out, models["base"], "text")
        assert not torch.equal(found[name], merged[name])


def test_what_nobody_has_is_the_bases_own(models: dict[str, Path]) -> None:
    manifest, merged = _merge(models, "text", "text2")
    base = load_folder(models["base"])
    for name, value in merged.items():
        assert torch.equal(value, base[name]) != name.startswith(TEXT), name
    assert manifest["tensors"][VISION + "pre_layrnorm.weight"]["reason"] == "no expert has this part: the base's own"


def test_a_language_model_may_have_another_type_within_its_base(tmp_path: Path) -> None:
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    base = transformers.Qwen2VLForConditionalGeneration(config)
    expert = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text))
    expert.model.load_state_dict(base.model.language_model.state_dict())
    expert.lm_head.load_state_dict(base.lm_head.state_dict())
    base.save_pretrained(tmp_path / "base")
    perturb(expert, 1).save_pretrained(tmp_path / "expert")
    _, merged = _merge({"base": tmp_path / "base", "expert": tmp_path / "expert"}, "expert", method="average")
    own, kept = load_folder(tmp_path / "expert"), load_folder(tmp_path / "base")
    for name, value in merged.items():
        _close(value, own[name] if name in own else kept[name])
    assert merged.keys() == kept.keys() > own.keys()


TORN = {
    "text": ("model.layers.1.", "model.norm.", "model.layers.0.mlp.up_proj.weight", "lm_head."),
    "vision": ("encoder.layers.1.", "post_layernorm.bias"),
    "full": ("vision_tower.", "multi_modal_projector.", "language_model.lm_head."),
}


@pytest.mark.parametrize(("name", "lost"), [(name, lost) for name, all_lost in TORN.items() for lost in all_lost])
def test_a_torn_file_stays_an_error(models: dict[str, Path], name: str, lost: str) -> None:
    """Also where all of a layer is gone, or all of the vision tower of a model that says that it sees."""
    weights = {key: value for key, value in load_folder(models[name]).items() if not key.startswith(lost)}
    save_file(weights, models[name] / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"expert {name}: lacks tensor "):
        _merge(models, name, "text2")


def test_a_body_without_its_head_says_so(models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"expert body: lacks tensor 'language_model\.lm_head\.weight'; fetch"):
        _merge(models, "body", "text2")
    rule = {"match": "language_model.lm_head.weight", "action": "base"}
    _, merged = _merge(models, "body", "text2", rules=[rule], method="average")
    body, text = load_folder(models["body"]), load_folder(models["text2"])
    for name, value in body.items():
        _close(merged[f"{TEXT}model.{name}"], value, text[f"model.{name}"])


def test_a_stranger_is_no_part(models: dict[str, Path]) -> None:
    make_model("bert").save_pretrained(models["base"].parent / "bert")
    with pytest.raises(CheckpointError, match="expert bert: is a 'bert' model, but the base is 'llava'"):
        _merge(models | {"bert": models["base"].parent / "bert"}, "bert", "text")
    transformers.CLIPVisionModel(make_model("llava", seed=9).config.vision_config).save_pretrained(models["vision"])
    with pytest.raises(CheckpointError, match="expert vision: does not come from this base: cosine"):
        _merge(models, "vision", "text")
