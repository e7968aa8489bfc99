"""A merge for each architecture: loads with from_pretrained, runs, and holds what the policy promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from builders import FAMILIES, inputs_for, load_folder, make_model, perturb, write_checkpoint
from oracles import relative_error

import acemerge


def _save_experts(root: Path, family: str, count: int = 3, **changes: Any) -> tuple[Path, list[Path], Any]:
    base = make_model(family, **changes)
    base.save_pretrained(root / "base")
    folders = []
    for seed in range(1, count + 1):
        perturb(make_model(family, **changes), seed).save_pretrained(root / f"e{seed}")
        folders.append(root / f"e{seed}")
    return root / "base", folders, type(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_loads_and_runs(family: str, tmp_path: Path) -> None:
    base, experts, cls = _save_experts(tmp_path, family)
    report = acemerge.merge(base, experts, "ace", out=tmp_path / "out", max_shard_size="20kB")
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    outputs = model.eval()(**inputs_for(family))
    assert all(torch.isfinite(value).all() for value in outputs.to_tuple() if isinstance(value, torch.Tensor))
    assert "ace" in {record["rule"] for record in report.tensors.values()}

    acemerge.merge(base, experts, "average", out=tmp_path / "mean")
    base_weights, tuned = load_folder(base), [load_folder(folder) for folder in experts]
    merged, averaged = load_folder(tmp_path / "out"), load_folder(tmp_path / "mean")
    assert merged.keys() == averaged.keys() == base_weights.keys()
    for name, record in report.tensors.items():
        W0 = base_weights[name].double()
        deltas = torch.stack([weights[name].double() - W0 for weights in tuned])
        mean = W0 + deltas.mean(0)
        assert relative_error(averaged[name], mean) < 1e-6, name
        if record["rule"] == "average":
            expected = mean
        elif record["role"] == "conv1d":
            expected = W0 + oracles.ace(deltas.mT).mT
        elif record["role"] == "experts":  # of both families that fuse them: each is stored (in, out)
            expected = W0 + torch.stack([oracles.ace(each.mT).mT for each in deltas.unbind(1)])
        else:
            expected = W0 + oracles.ace(deltas)
        assert relative_error(merged[name], expected) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_and_the_folder_path_agree(family: str, tmp_path: Path) -> None:
    base, experts, cls = _save_experts(tmp_path, family)
    acemerge.merge(base, experts, out=tmp_path / "out")
    models = [cls.from_pretrained(folder) for folder in (base, *experts)]
    before = [{n: v.clone() for n, v in model.state_dict().items()} for model in models]
    merged = acemerge.merge_models(models[0], models[1:])
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    from_folder = cls.from_pretrained(tmp_path / "out").state_dict()
    for name, value in merged.state_dict().items():
        if "experts" in name and value.ndim == 3:
            continue  # on disk gate and up are merged apart, in memory they are one fused matrix
        assert relative_error(value, from_folder[name]) < 1e-5, name


def test_conv1d_as_stored_is_the_papers_own(tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, "gpt2")
    acemerge.merge(base, experts, "ace", out=tmp_path / "stored", orientation="stored")
    report = acemerge.merge(base, experts, "ace", out=tmp_path / "paper", policy="paper")
    name = "transformer.h.0.mlp.c_fc.weight"
    W0 = load_folder(base)[name].double()
    expected = W0 + oracles.ace(torch.stack([load_folder(e)[name].double() - W0 for e in experts]))
    assert relative_error(load_folder(tmp_path / "stored")[name], expected) < 1e-5
    assert relative_error(load_folder(tmp_path / "paper")[name], expected) < 1e-5
    assert report.tensors["transformer.wte.weight"]["rule"] == "ace"
    assert report.tensors["transformer.ln_f.weight"]["rule"] == "average"


@pytest.mark.parametrize(
    ("family", "kept", "by_rule"),
    [
        ("roberta", "classifier.dense.weight", "roberta.encoder.layer.0.attention.self.query.weight"),
        ("roberta", "roberta.embeddings.word_embeddings.weight", "roberta.encoder.layer.1.output.dense.weight"),
        ("roberta", "roberta.encoder.layer.0.output.dense.bias", "roberta.encoder.layer.0.output.dense.weight"),
        ("llama", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_the_papers_policy(family: str, kept: str, by_rule: str, tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, family)
    report = acemerge.merge(base, experts, "ace", out=tmp_path / "out", policy="paper")
    assert report.tensors[kept]["rule"] == "base"
    assert torch.equal(load_folder(tmp_path / "out")[kept], load_folder(base)[kept])
    assert report.tensors[by_rule]["rule"] == "ace"


def test_the_papers_policy_averages_the_text_projection(tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, "clip")
    report = acemerge.merge(base, experts, "ace", tmp_path / "out", policy="paper")
    name = "text_projection.weight"
    mean = torch.stack([load_folder(expert)[name] for expert in experts]).mean(0)
    assert report.tensors[name]["rule"] == "average"
    assert relative_error(load_folder(tmp_path / "out")[name], mean) < 1e-6
    assert report.tensors["visual_projection.weight"]["rule"] == "ace"


def test_the_papers_policy_refuses_a_family_it_never_ran(tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, "bert", count=1)
    with pytest.raises(acemerge.UsageError, match="no run with model_type 'bert'"):
        acemerge.merge(base, experts, "ace", policy="paper")


# --- names that differ for the same tensor ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "body", "prefix"), [("gpt2", "GPT2Model", "transformer."), ("bert", "BertModel", "bert.")]
)
def test_a_body_saved_without_its_prefix_is_matched(family: str, body: str, prefix: str, tmp_path: Path) -> None:
    """As the Hub's gpt2 is: a body's names, and the language model's config."""
    import transformers

    base, experts, cls = _save_experts(tmp_path, family)
    acemerge.merge(base, experts, out=tmp_path / "reference")
    config = json.loads((base / "config.json").read_text()) | {"n_ctx": 1024}
    getattr(transformers, body).from_pretrained(base).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    report = acemerge.merge(tmp_path / "bare", experts, out=tmp_path / "out")
    assert "kron_auto" in {record["rule"] for record in report.tensors.values()}
    merged, reference = load_folder(tmp_path / "out"), load_folder(tmp_path / "reference")
    shared = [name for name in merged if prefix + name in reference]
    assert len(shared) > 20
    assert all(torch.equal(merged[name], reference[prefix + name]) for name in shared)
    cls.from_pretrained(tmp_path / "out")


def test_an_adapter_of_the_whole_is_merged_into_a_body_by_itself(tmp_path: Path) -> None:
    """As the Hub's gpt2 is, with an adapter that PEFT trained on the language model."""
    import peft
    import transformers

    base = make_model("gpt2")
    base.save_pretrained(tmp_path / "whole")
    base.transformer.save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"n_ctx": 1024}
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    tuned = peft.get_peft_model(base, lora)
    tuned.save_pretrained(tmp_path / "lora")
    acemerge.merge(tmp_path / "body", [tmp_path / "lora"], "task_arithmetic", out=tmp_path / "out", scale=1.0)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name, value in tuned.merge_and_unload().state_dict().items():
        assert relative_error(merged[name], value.double()) < 1e-6, name


def test_sizes_of_kernels_are_the_configurations_own(tmp_path: Path) -> None:
    """An audio model with its own convolutions, whose base has weight norms under their old names."""
    import transformers

    sizes = {"conv_dim": [8, 8], "conv_kernel": [3, 5], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
    sizes |= {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes))
    model.save_pretrained(tmp_path / "new")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = load_folder(tmp_path / "new")
    for now, before in old.items():
        weights = {name.replace(now, before): value for name, value in weights.items()}
    base = write_checkpoint(tmp_path / "base", weights, json.loads((tmp_path / "new" / "config.json").read_text()))
    perturb(model, 1).save_pretrained(tmp_path / "tuned")
    report = acemerge.merge(base, [tmp_path / "tuned"], "task_arithmetic", out=tmp_path / "out", scale=1.0)
    assert report.manifest["roles"] == "the architecture Wav2Vec2ForCTC"
    merged = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out").state_dict()
    assert all(relative_error(merged[name], value.double()) < 1e-6 for name, value in model.state_dict().items())


def test_legacy_norm_names_are_matched(tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, "bert")
    acemerge.merge(base, experts, out=tmp_path / "reference")
    new, old = ("LayerNorm.weight", "LayerNorm.bias"), ("LayerNorm.gamma", "LayerNorm.beta")
    legacy = {n.replace(new[0], old[0]).replace(new[1], old[1]): v for n, v in load_folder(experts[0]).items()}
    write_checkpoint(experts[0], legacy)
    acemerge.merge(base, experts, out=tmp_path / "out")
    reference = load_folder(tmp_path / "reference")
    assert all(torch.equal(value, reference[name]) for name, value in load_folder(tmp_path / "out").items())


def test_masks_that_an_older_version_saved_stay(tmp_path: Path) -> None:
    base, experts, _ = _save_experts(tmp_path, "gpt2")
    write_checkpoint(base, load_folder(base) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril()})
    report = acemerge.merge(base, experts, out=tmp_path / "out")
    assert report.tensors["transformer.h.0.attn.bias"]["reason"].startswith("no parameter of the architecture")


# --- tied weights --------------------------------------------------------------------------------------------


def _respell(folder: Path, both: bool) -> None:
    """Store the tied head under its other name, or under both."""
    from safetensors.torch import save_file

    weights = load_folder(folder)
    shared = weights["model.embed_tokens.weight"] if both else weights.pop("model.embed_tokens.weight")
    save_file(weights | {"lm_head.weight": shared.clone()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("base_spelling", ["embedding", "head", "both"])
@pytest.mark.parametrize("expert_spelling", ["embedding", "head", "both"])
def test_tied_weights_are_written_once_whatever_their_spelling(
    base_spelling: str, expert_spelling: str, tmp_path: Path
) -> None:
    base, experts, cls = _save_experts(tmp_path, "qwen3")
    acemerge.merge(base, experts, out=tmp_path / "reference")
    for folder, spelling in [(base, base_spelling), (experts[1], expert_spelling)]:
        if spelling != "embedding":
            _respell(folder, both=spelling == "both")
    acemerge.merge(base, experts, out=tmp_path / "out")
    names = load_folder(tmp_path / "out").keys() & {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(names) == 1
    found, reference = (cls.from_pretrained(tmp_path / f) for f in ("out", "reference"))
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert torch.equal(found.lm_head.weight, reference.lm_head.weight)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, experts, _ = _save_experts(tmp_path, "qwen3")
    weights = load_folder(experts[0])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, experts[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(acemerge.CheckpointError, match="should be tied but differ"):
        acemerge.merge(base, experts, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- heads ---------------------------------------------------------------------------------------------------


def test_heads_whose_shapes_differ_are_kept_beside(tmp_path: Path) -> None:
    base = make_model("vit")
    base.save_pretrained(tmp_path / "base")
    for labels in (2, 5):
        perturb(make_model("vit", num_labels=labels), labels).save_pretrained(tmp_path / f"{labels}-labels")
    experts = [tmp_path / "2-labels", tmp_path / "5-labels"]
    report = acemerge.merge(tmp_path / "base", experts, out=tmp_path / "out")
    assert report.tensors["classifier.weight"]["rule"] == "base"
    for folder in experts:
        from safetensors.torch import load_file

        head = load_file(tmp_path / "out" / "heads" / f"{folder.name}.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        assert torch.equal(head["classifier.weight"], load_folder(folder)["classifier.weight"])
    type(base).from_pretrained(tmp_path / "out")


def test_classifiers_on_a_language_model_base_keep_the_bases_own_head(tmp_path: Path) -> None:
    import transformers

    base = make_model("bert")
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        tuned = transformers.BertForSequenceClassification(base.config)
        tuned.bert.load_state_dict(base.bert.state_dict(), strict=False)  # which has no pooler
        perturb(tuned, seed).save_pretrained(tmp_path / f"e{seed}")
    report = acemerge.merge(tmp_path / "base", [tmp_path / "e1", tmp_path / "e2"], out=tmp_path / "out")
    assert report.tensors["cls.predictions.bias"]["reason"] == "no expert has it: the base's own"
    assert report.manifest["heads"]["e1"]["classifier.weight"] == "missing in the base"
    assert any("bert.pooler" in warning for warning in report.manifest["warnings"])
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
