"""Roles: what the architecture says, and that names and shapes say the same where they can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import FAMILIES, make_model
from torch import nn

from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import CheckpointError
from acemerge.models import architecture
from acemerge.models.architecture import meta_model
from acemerge.models.roles import find_roles, role_by_name, roles_by_name, roles_from_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_knows_every_tensor_and_names_agree(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    roles = find_roles(checkpoint.config, checkpoint.tensors)
    assert roles.source == f"the architecture {FAMILIES[family][0]}"
    assert {role.origin for role in roles.by_name.values()} == {"architecture"}
    guessed = roles_by_name(checkpoint.tensors, checkpoint.config).by_name
    for name, role in roles.by_name.items():
        assert (role.name, role.transposed) == (guessed[name].name, guessed[name].transposed), name


def test_special_tensors_are_told_apart(tmp_path: Path) -> None:
    for family in ("gpt2", "qwen3_moe", "t5", "bart", "clip", "llava", "gpt_oss", "llama4"):
        make_model(family).save_pretrained(tmp_path / family)

    def role(family: str, name: str) -> str:
        checkpoint = open_checkpoint(tmp_path / family)
        found = find_roles(checkpoint.config, checkpoint.tensors).by_name[name]
        return found.name + (" transposed" if found.transposed else "")

    assert role("gpt2", "transformer.h.0.attn.c_attn.weight") == "conv1d transposed"
    assert role("gpt2", "transformer.wpe.weight") == "embedding"
    assert role("qwen3_moe", "lm_head.weight") == "output_head"
    assert role("qwen3_moe", "model.layers.0.mlp.experts.0.up_proj.weight") == "linear"
    assert role("qwen3_moe", "model.layers.0.mlp.gate.weight") == "linear"
    for family, fused in (("gpt_oss", "mlp.experts"), ("llama4", "feed_forward.experts")):
        assert role(family, f"model.layers.0.{fused}.gate_up_proj") == "experts transposed"
        assert role(family, f"model.layers.0.{fused}.down_proj") == "experts transposed"
    assert role("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias") == "bias"
    assert role("gpt_oss", "model.layers.0.self_attn.sinks") == "other"
    assert role("bart", "model.shared.weight") == role("bart", "model.encoder.embed_positions.weight") == "embedding"
    assert role("llava", "multi_modal_projector.linear_1.weight") == "linear"
    assert role("llava", "vision_tower.embeddings.patch_embedding.weight") == "convolution"
    assert role("t5", "shared.weight") == "embedding"
    assert role("clip", "vision_model.embeddings.patch_embedding.weight") == "convolution"
    assert role("clip", "logit_scale") == "other"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "names no architecture"),
        ({"architectures": ["NoSuchModel"], "model_type": "bert"}, "has no 'NoSuchModel'"),
        ({"architectures": ["os"], "model_type": "bert"}, "has no 'os'"),
        ({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": "x"}, "could not be built"),
        ({"architectures": ["pipeline"], "model_type": "bert"}, "has no 'pipeline'"),
        ({"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 10**9}, "asks for"),
        ({"architectures": ["BertModel"], "model_type": "bert", "num_labels": 10**7}, "asks for num_labels"),
        (
            {"architectures": ["BertModel"], "model_type": "bert", "rope": {"factor": 10**3000}},
            "asks for factor = 10000",
        ),
        ({"architectures": ["CLIPModel"], "model_type": "clip", "text_config": {"num_hidden_layers": 10**5}}, "parts"),
        ({"architectures": ["SwinModel"], "model_type": "swin", "depths": [10**6, 1]}, "asks for depths"),
        ({"architectures": ["SwinModel"], "model_type": "swin", "depths": [1] * 200_000}, "asks for depths = 200,000"),
        ({"architectures": ["SegformerModel"], "model_type": "segformer", "depths": [500] * 500}, "parts"),
        ({"architectures": ["MistralModel"], "model_type": "mistral", "num_hidden_layers": 2 * 10**5}, "parts"),
    ],
)
def test_an_architecture_that_cannot_be_built_falls_back_and_says_so(config: dict[str, object], reason: str) -> None:
    spec = TensorSpec("encoder.dense.weight", torch.float32, (4, 3))
    roles = find_roles(config, {spec.name: spec})
    assert reason in roles.source
    assert len(roles.source) < 400
    assert roles.by_name[spec.name].name == "linear"
    assert roles.by_name[spec.name].origin == "name"


def test_the_names_tell_where_a_model_has_more_parts_than_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound grows with the checkpoint: a deep model is built for a deep checkpoint."""
    config = {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 40}
    monkeypatch.setattr(architecture, "_PARTS", 500)
    assert meta_model(config, 200) == (None, "BertModel would have more than 800 parts")
    assert meta_model(config, 700)[1] == ""


def test_what_takes_too_long_is_refused_and_not_told_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is built in time may depend on the machine: what is merged may not."""
    import transformers

    def endless(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(architecture, "_SECONDS", 0.2)
    monkeypatch.setattr(transformers.BertModel, "__init__", endless)
    with pytest.raises(CheckpointError, match=r"describes a BertModel that was not built in 0\.2 seconds"):
        find_roles({"architectures": ["BertModel"], "model_type": "bert"}, {})


HOSTILE = {
    "attn_implementation": "evil-org/evil-kernel",
    "_attn_implementation": "evil-org/evil-kernel",
    "auto_map": {"AutoModel": "evil--code.Model"},
    "backbone": "evil/repo",
    "use_pretrained_backbone": True,
    "use_timm_backbone": False,
    "backbone_config": None,
    "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": "evil-org/evil-kernel:RMSNorm"}},
}


@pytest.mark.parametrize("architecture", ["BertModel", "DPTForDepthEstimation", "DetrModel"])
def test_a_config_cannot_reach_out(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither code nor files of another repository are asked for, whatever the config names."""
    import socket

    import transformers

    asked: list[object] = []  # errors raised here would be swallowed with those of an odd config

    def network(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    seen: list[dict[str, object]] = []
    cls = getattr(transformers, architecture)
    build = cls.config_class.from_dict

    def spied(settings: dict[str, object], **rest: object) -> object:
        seen.append(settings)
        return build(settings, **rest)

    monkeypatch.setattr(socket, "getaddrinfo", network)
    monkeypatch.setattr(cls.config_class, "from_dict", spied)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    spec = TensorSpec("encoder.dense.weight", torch.float32, (4, 3))
    config = {"architectures": [architecture], "model_type": "any", **small, **HOSTILE, "text_config": HOSTILE}
    find_roles(config, {spec.name: spec})
    assert asked == []
    (settings,) = seen
    assert settings["attn_implementation"] == "eager"
    assert settings.keys() & HOSTILE.keys() == {"attn_implementation"}
    assert settings["text_config"] == {}


def test_building_a_model_leaves_the_hub_as_it_was_and_offline_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from huggingface_hub import constants

    offline: list[bool] = []
    real = transformers.BertModel.__init__

    def spied(self: object, *args: object, **rest: object) -> None:
        offline.append(constants.HF_HUB_OFFLINE)
        real(self, *args, **rest)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.BertModel, "__init__", spied)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}
    find_roles(config, {})
    assert offline == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_fused_experts_of_llama4_are_stored_in_out() -> None:
    import transformers

    config = transformers.Llama4TextConfig(
        hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, vocab_size=40, head_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    specs = {n: TensorSpec(n, p.dtype, tuple(p.shape)) for n, p in model.named_parameters()}
    roles = roles_from_model(model, specs, "test").by_name
    fused = {name: role for name, role in roles.items() if role.name == "experts"}
    assert len(fused) == 2
    assert all(role.transposed for role in fused.values())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.mlp.experts.gate_up", (4, 6, 5), "experts"),
        ("features.0.weight", (8, 3, 3, 3), "convolution"),
        ("bn.running_mean", (8,), "other"),
        ("model.norm.weight", (8,), "norm"),
        ("h.0.ln_1.weight", (8,), "norm"),
        ("wte.weight", (50, 8), "embedding"),
        ("lm_head.weight", (50, 8), "output_head"),
        ("fc.weight", (5, 8), "linear"),
        ("fc.bias", (5,), "bias"),
        ("logit_scale", (), "other"),
    ],
)
def test_roles_by_name(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert role_by_name(TensorSpec(name, torch.float32, shape), conv1d=False).name == expected


def test_a_plain_module_is_asked_for_its_modules() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 4)
            self.tied = self.dense

    model = Fused()
    state = {name: TensorSpec(name, v.dtype, tuple(v.shape)) for name, v in model.state_dict().items()}
    roles = roles_from_model(model, state, "Fused")
    assert roles.by_name["dense.weight"].name == "linear"
    assert roles.identity["tied.weight"] == roles.identity["dense.weight"] == "dense.weight"


def test_fused_experts_may_be_stored_transposed() -> None:
    class MyExperts(nn.Module):
        def __init__(self, is_transposed: bool) -> None:
            super().__init__()
            self.is_transposed = is_transposed
            self.up = nn.Parameter(torch.zeros(2, 4, 3))

    for transposed in (False, True):
        spec = {"up": TensorSpec("up", torch.float32, (2, 4, 3))}
        role = roles_from_model(MyExperts(transposed), spec, "test").by_name["up"]
        assert (role.name, role.transposed) == ("experts", transposed)
