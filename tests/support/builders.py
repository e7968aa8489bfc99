"""Small checkpoints made on the spot: plain tensors, and tiny random models of each architecture."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw_safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """An adapter in PEFT's layout, from the A and B of each module; with alpha = r the factor on B A is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (A, B) in factors.items():
        prefix = f"base_model.model.{module}"
        tensors |= {f"{prefix}.lora_A.weight": A.contiguous(), f"{prefix}.lora_B.weight": B.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next((len(A) for A, _ in factors.values()), 1)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@dataclass
class PlainModel:
    """Two linear layers, a norm, an embedding and an integer buffer; experts at increasing distance."""

    root: Path
    dtype: torch.dtype = torch.float32
    experts: int = 3
    seed: int = 0
    base: dict[str, Tensor] = field(init=False)
    tuned: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        base = {
            "embed_tokens.weight": draw(11, 6),
            "layers.0.up.weight": draw(8, 6),
            "layers.0.up.bias": draw(8),
            "layers.0.down.weight": draw(6, 8),
            "layers.0.norm.weight": draw(6),
        }
        self.base = {name: value.to(self.dtype) for name, value in base.items()}
        self.base["position_ids"] = torch.arange(5)
        self.tuned = []
        for i in range(1, self.experts + 1):
            moved = {n: (v + 0.1 * i * draw(*v.shape)).to(self.dtype) for n, v in base.items()}
            self.tuned.append(moved | {"position_ids": torch.arange(5)})

    def save(self) -> tuple[Path, list[Path]]:
        base = write_checkpoint(self.root / "base", self.base)
        return base, [write_checkpoint(self.root / f"e{i}", t) for i, t in enumerate(self.tuned, 1)]


def load_folder(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


# --- tiny models ---------------------------------------------------------------------------------------------

_TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = _TEXT | {"intermediate_size": 24, "max_position_embeddings": 12}
_LLAMA = _TEXT | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = {"image_size": 8, "patch_size": 4}
_CLIP_TEXT = {k: v for k, v in _BERT.items() if k != "intermediate_size"} | {"intermediate_size": 24} | _SPECIAL

# name -> (model class, config class, config values)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _BERT | _SPECIAL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2} | _SPECIAL),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION | _IMAGE),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": _VISION | _IMAGE, "projection_dim": 8},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 12}
        | _SPECIAL,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | _SPECIAL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"tie_word_embeddings": True} | _SPECIAL),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama"} | _LLAMA | _SPECIAL,
            "vision_config": {"model_type": "clip_vision_model"} | _VISION | _IMAGE,
            "image_token_index": 39,
            "image_seq_length": 4,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _LLAMA | {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"]} | _SPECIAL,
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _LLAMA | {"num_local_experts": 2, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1} | _SPECIAL,
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _LLAMA | {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2} | _SPECIAL,
    ),
}

_VISION_MOE = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
_VISION_MOE |= {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 1, "num_position_embeddings": 4}
_LATENT = {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_LATENT |= {"moe_intermediate_size": 12, "n_shared_experts": 1, "n_routed_experts": 4, "v_head_dim": 8, "n_group": 2}
_QWEN_MOE = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}

# Where adapters have their own ways: routers, state space layers, experts that are fused or stored apart.
ADAPTER_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = FAMILIES | {
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2} | _SPECIAL,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        _LLAMA
        | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
        | {"expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False}
        | _SPECIAL,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2} | _SPECIAL,
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {k: v for k, v in _LLAMA.items() if k != "head_dim"}
        | _LATENT
        | {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | _SPECIAL,
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": _LLAMA | _QWEN_MOE | _SPECIAL, "vision_config": _VISION_MOE},
    ),
}


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    import transformers

    model_class, config_class, values = ADAPTER_FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**(values | changes))
    return getattr(transformers, model_class)(config).eval()


def perturb(model: Any, seed: int, size: float = 0.02) -> Any:
    """Move every floating-point parameter in place, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_for(family: str) -> dict[str, Tensor]:
    tokens = torch.arange(6)[None] + 3
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    if family == "vit":
        return {"pixel_values": pixels}
    if family == "clip":
        return {"input_ids": tokens, "pixel_values": pixels}
    if family in ("t5", "bart"):
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}
