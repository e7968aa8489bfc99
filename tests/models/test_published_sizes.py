"""Models at the sizes that they were published in: the architecture of each is built, and tells every tensor's role."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from acemerge.checkpoints.header import TensorSpec
from acemerge.models.architecture import meta_model
from acemerge.models.roles import roles_from_model

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


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_model_of_its_published_size_is_built_and_gives_roles(architecture: str) -> None:
    settings = json.loads(getattr(transformers, architecture).config_class(**PUBLISHED[architecture]).to_json_string())
    model, why_not = meta_model(settings | PUBLISHED[architecture] | {"architectures": [architecture]}, 0)
    assert model is not None, why_not
    state = model.state_dict()
    roles = roles_from_model(model, {n: TensorSpec(n, v.dtype, tuple(v.shape)) for n, v in state.items()}, "test")
    assert {role.origin for role in roles.by_name.values()} == {"architecture"}
    layers = [n for n, role in roles.by_name.items() if role.name in ("linear", "conv1d", "experts", "convolution")]
    assert sum(state[name].numel() for name in layers) > 5_000_000
