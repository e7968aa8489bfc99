"""Types of models: the sizes that they were published in, and tiny ones of them for a whole merge."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from builders import FAMILIES, perturb
from safetensors.torch import load_file
from torch import Tensor

import acemerge
from acemerge.errors import AcemergeError
from acemerge.extract import extract_lora
from acemerge.models.architecture import meta_model

_BART_LARGE = {"encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
_BART_LARGE |= {"d_model": 1024, "encoder_attention_heads": 16, "decoder_attention_heads": 16}
_BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

# Architecture -> what its publication says; where that is nothing, transformers' defaults are the published sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    # --- text, both ways
    "BertForMaskedLM": _BERT_LARGE,
    "RobertaForMaskedLM": _BERT_LARGE | {"vocab_size": 50265, "max_position_embeddings": 514},
    "XLMRobertaForSequenceClassification": _BERT_LARGE | {"vocab_size": 250002, "num_labels": 1500},
    "DistilBertForMaskedLM": {},
    "AlbertForMaskedLM": {},
    "DebertaV2ForSequenceClassification": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ElectraForPreTraining": {},
    "MPNetForMaskedLM": {},
    "ModernBertForMaskedLM": {},
    "ConvBertForMaskedLM": {"conv_kernel_size": 9},
    "LayoutLMForTokenClassification": {},
    "XLNetLMHeadModel": {"d_model": 1024, "d_inner": 4096, "n_layer": 24, "n_head": 16, "vocab_size": 32000},
    # --- text, onwards
    "GPT2LMHeadModel": {"n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024},
    "GPTNeoForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048, "rotary_dim": 64},
    "GPTBigCodeForCausalLM": {"n_embd": 2048, "n_inner": 8192, "n_head": 16, "n_layer": 24, "n_positions": 2048},
    "MptForCausalLM": {"d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048, "vocab_size": 50432},
    "OPTForCausalLM": {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    "BloomForCausalLM": {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "FalconForCausalLM": {},
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "CohereForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "MambaForCausalLM": {"conv_kernel": 4, "state_size": 16},
    # --- mixtures of experts
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
    "GptOssForCausalLM": {},
    "SwitchTransformersForConditionalGeneration": {"num_experts": 64},
    # --- text to text
    "T5ForConditionalGeneration": {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_layers": 24, "num_heads": 16},
    "MT5ForConditionalGeneration": {},
    "BartForConditionalGeneration": _BART_LARGE,
    "BartModel": _BART_LARGE,
    "PegasusForConditionalGeneration": _BART_LARGE,
    "MarianMTModel": _BART_LARGE,
    "M2M100ForConditionalGeneration": _BART_LARGE,
    # --- sound
    "WhisperForConditionalGeneration": _BART_LARGE | {"vocab_size": 51865, "max_source_positions": 1500},
    "Wav2Vec2ForCTC": {"conv_kernel": [10, 3, 3, 3, 3, 2, 2]},
    "HubertForCTC": {"conv_kernel": [10, 3, 3, 3, 3, 2, 2]},
    "WavLMForCTC": {},
    "ASTForAudioClassification": {},
    # --- images
    "ViTForImageClassification": {"num_labels": 21843, "image_size": 384},
    "DeiTForImageClassification": {},
    "BeitForImageClassification": {"num_labels": 21841},
    "SwinForImageClassification": {},
    "ConvNextForImageClassification": {},
    "Dinov2Model": {},
    "ResNetForImageClassification": {},
    "SegformerForSemanticSegmentation": {},
    "MobileViTForImageClassification": {"conv_kernel_size": 3},
    "CLIPModel": {},
    "SiglipModel": {},
    # --- images and text
    "LlavaForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
    "ViltModel": {},
}

# A setting of any configuration that has it, so that the model is tiny.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "projection_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "depth", "num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim", "n_inner"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("d_kv", "head_dim", "d_head"), 8),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "max_source_positions"), 48),
    **dict.fromkeys(("max_target_positions", "max_seq_len", "image_size", "max_length"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), 1),
    **dict.fromkeys(("pad_token_id",), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4, "rotary_dim": 4, "num_labels": 3, "layer_types": None, "rope_scaling": None,
    "patch_size": 8, "begin_suppress_tokens": None, "suppress_tokens": None, "vision_end_token_id": 3,
    "image_token_id": 4, "image_token_index": 4, "video_token_id": 5, "vision_start_token_id": 6,
    "global_attn_every_n_layers": 1, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "time_step_rank": 2, "pooler_hidden_size": 16, "state_size": 4, "max_2d_position_embeddings": 48,
}  # fmt: skip
# What is tiny in a way of its own.
_TINY: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {"num_hidden_groups": 1},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 8},
    "SwinForImageClassification": {"depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 2},
    "ConvNextForImageClassification": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "ResNetForImageClassification": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "Wav2Vec2ForCTC": {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    "HubertForCTC": {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    "WavLMForCTC": {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1] * 4,
        "num_attention_heads": [1, 1, 2, 2],
    },
    "MobileViTForImageClassification": {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 8]},
}
_DERIVED = ("id2label", "label2id", "stage_names", "out_features", "out_indices")  # of the other settings
_ALIKE = 1e-5
_RANK = 64  # of all tiny layers: an adapter then holds them whole


@dataclass(frozen=True)
class Row:
    """What came of a type of model: `yes`, or why not."""

    built: str
    full: str
    lora: str
    adapter: str

    def __iter__(self) -> Iterator[str]:
        return iter(astuple(self))


def published(architecture: str) -> dict[str, Any]:
    """The configuration of the architecture at its published size, as it is on disk."""
    import transformers

    config = getattr(transformers, architecture).config_class(**PUBLISHED[architecture])
    return {**json.loads(config.to_json_string()), **PUBLISHED[architecture], "architectures": [architecture]}


def tiny(architecture: str) -> Any:
    """A tiny random model of the architecture, by the families of the tests where they have it."""
    import transformers

    cls = getattr(transformers, architecture)
    families = {name: (config, values) for name, config, values in FAMILIES.values()}
    torch.manual_seed(0)
    if architecture in families:
        config, values = families[architecture]
        return cls(getattr(transformers, config)(**values)).eval()
    settings = _shrunk(json.loads(cls.config_class().to_json_string()))
    return cls(cls.config_class.from_dict(settings | _TINY.get(architecture, {}))).eval()


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _DERIVED}
    return {key: _shrunk(v) if isinstance(v, dict) else _SMALL.get(key, v) for key, v in kept.items()}


def try_out(architecture: str, folder: Path) -> Row:
    """Build the published size, and take a tiny model through a merge of each kind."""
    model, why_not = meta_model(published(architecture), 0) if architecture in PUBLISHED else (tiny(architecture), "")
    trials = (_full, _lora, _adapter)
    tried = [_outcome(trial, architecture, folder / trial.__name__.strip("_")) for trial in trials]
    return Row("yes" if model is not None else why_not, *tried)


def _outcome(trial: Callable[[str, Path], float], architecture: str, folder: Path) -> str:
    try:
        error = trial(architecture, folder)
    except AcemergeError as failure:
        return f"no: {failure.what}"
    except Exception as failure:  # of the libraries that make the adapter, or load what was written
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(failure.__traceback__)]
        packages = {name.split(".")[0] for name in frames}
        package = next((name for name in ("peft", "transformers") if name in packages), "a test")
        return f"no: {type(failure).__name__} in {package}"
    if math.isnan(error):
        return "no: not all of its layers are loaded"
    return "yes" if error < _ALIKE else f"no: differs by {error:.0e}"


def _full(architecture: str, folder: Path) -> float:
    """A fine-tune alone, its whole task vector: the output is the fine-tune."""
    base, tuned = tiny(architecture), perturb(tiny(architecture), 1)
    _save(folder, base=base, tuned=tuned)
    acemerge.merge(folder / "base", [folder / "tuned"], "task_arithmetic", out=folder / "out", scale=1.0)
    loaded = (type(base).from_pretrained(folder / name).state_dict() for name in ("out", "tuned"))
    return _difference(*loaded)


def _lora(architecture: str, folder: Path) -> float:
    """An adapter of every linear layer, as PEFT makes it: the output is what its own merge gives."""
    import peft

    base = tiny(architecture)
    _save(folder, base=base)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(type(base).from_pretrained(folder / "base"), settings)
    tuned.save_pretrained(folder / "lora")
    acemerge.merge(folder / "base", [folder / "lora"], "task_arithmetic", out=folder / "out", scale=1.0)
    return _difference(type(base).from_pretrained(folder / "out").state_dict(), tuned.merge_and_unload().state_dict())


def _adapter(architecture: str, folder: Path) -> float:
    """An adapter that holds all that a fine-tune changed of its linear layers, loaded by PEFT."""
    import peft

    base, tuned = tiny(architecture), perturb(tiny(architecture), 1)
    _save(folder, base=base, tuned=tuned)
    extract_lora(folder / "tuned", folder / "base", _RANK, folder / "out")
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(folder / "base"), str(folder / "out"))
    layers = [name for name, module in loaded.get_base_model().named_modules() if "lora_A" in module._modules]
    written = load_file(folder / "out" / "adapter_model.safetensors")
    if 2 * len(layers) != len(written):
        return float("nan")
    merged, expected = (model.state_dict() for model in (loaded.merge_and_unload(), tuned))
    names = [f"{layer}.weight" for layer in layers]
    return _difference({name: merged[name] for name in names}, {name: expected[name] for name in names})


def _save(folder: Path, **models: Any) -> None:
    for name, model in models.items():
        model.save_pretrained(folder / name)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    floats = [name for name, value in expected.items() if value.is_floating_point()]
    return max((found[name] - expected[name]).abs().max().item() for name in floats)
