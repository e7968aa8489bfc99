"""Row 31: configurations that ask for more than any model has: lists of 200,000 entries, products of sizes, nesting.

The architecture is built in bounded time and memory, or it is said why not, and the roles are told by the names. Small
models of the same types are built. Those of published sizes are in tests/models/test_published_sizes.py.
"""

from __future__ import annotations

import json
import random
import reprlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.checkpoints.folder import open_checkpoint
from acemerge.models.architecture import meta_model
from attacks import models
from attacks.harness import Meter, Must, Tally, check, clean, in_child, main

ROW = 31
SECONDS, NBYTES = 60.0, 500_000_000
_TENSORS = 100

# A label, what config.json holds, and whether it describes a model.
Case = tuple[str, Any, Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them, ten to a process: what one leaves in memory is not the next one's."""
    tally = Tally()
    chosen = random.Random(seed).sample(range(FULL), min(count, FULL))
    for start in range(0, len(chosen), 10):
        tally.add(in_child(batch, folder, tuple(chosen[start : start + 10]), timeout=1200))
    return tally


def batch(folder: Path, chosen: tuple[int, ...]) -> Tally:
    """Some of the cases, by their numbers."""
    tally, cases = Tally(), list(_cases())
    models.write_single(folder, {f"layers.{i}.weight": ("F32", (2, 2)) for i in range(_TENSORS)})
    _build(folder, _first(), True)
    for i in chosen:
        label, config, must = cases[i]
        clean(tally, label, partial(_build, folder, config, must == "accept"), must, Meter(SECONDS, NBYTES))
    return tally


def _build(folder: Path, config: Any, built: bool) -> None:
    """As `plan` does: the folder is opened, and its architecture asked for roles."""
    models.overwrite(folder / "config.json", json.dumps(config).encode())
    found = open_checkpoint(folder)
    model, why_not = meta_model(found.config, len(found.tensors))
    check(not built or model is not None, f"was not built: {why_not}")
    check(model is not None or (bool(why_not) and len(why_not) < 400), f"says {why_not[:200]!r}")


# Models that are small; a case changes one thing of them, or two.
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
_SMALL: dict[str, dict[str, Any]] = {
    "GPT2Model": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 50},
    "LlamaForCausalLM": {"model_type": "llama", **_LAYERS, "num_key_value_heads": 2, "vocab_size": 50},
    "MixtralForCausalLM": {
        "model_type": "mixtral", **_LAYERS, "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 50
    },
    "BertForSequenceClassification": {"model_type": "bert", **_LAYERS, "vocab_size": 50},
    "T5Model": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "SwinModel": {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32},
    "ResNetModel": {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
    "ConvNextModel": {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Wav2Vec2Model": {
        "model_type": "wav2vec2", **_LAYERS, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    },
    "SegformerModel": {"model_type": "segformer", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "CLIPModel": {"model_type": "clip", "text_config": dict(_LAYERS), "vision_config": {**_LAYERS, "image_size": 32}},
}  # fmt: skip
_MANY = 200_000
_BILLION = 10**9
# By architecture: what is asked for in the place of what is there.
_HOSTILE: dict[str, tuple[dict[str, Any], ...]] = {
    "GPT2Model": (
        {"n_layer": _MANY}, {"n_layer": _BILLION}, {"n_layer": 10**30}, {"n_layer": -1}, {"n_layer": 1e9},
        {"n_layer": [2] * _MANY}, {"n_embd": 10**7, "n_head": 10**7}, {"n_layer": 5000, "n_embd": 10**6},
        {"n_positions": 10**7}, {"n_positions": 10**6, "n_embd": 10**6}, {"vocab_size": 10**15}, {"n_inner": 10**12},
        {"n_head": 0}, {"n_layer": 262_143}, {"n_layer": True}, {"n_layer": "9" * 100_000}, {"n_positions": 16_777_215},
    ),
    "LlamaForCausalLM": (
        {"num_hidden_layers": _MANY}, {"num_hidden_layers": 262_144}, {"num_hidden_layers": 30_000},
        {"layer_types": ["full_attention"] * _MANY}, {"layer_types": ["full_attention"] * 9_999},
        {"num_hidden_layers": 9_999, "layer_types": ["full_attention"] * 9_999}, {"head_dim": 10**12},
        {"max_position_embeddings": 10**15}, {"hidden_size": 10**9, "intermediate_size": 10**9},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**300}}, {"num_attention_heads": 10**8},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * _MANY, "long_factor": [1.0] * _MANY}},
        {"rope_parameters": {str(i): {"rope_type": "default", "rope_theta": 1e4} for i in range(_MANY // 10)}},
        {"pretraining_tp": _MANY}, {"num_key_value_heads": 10**9},
        {"pruned_heads": {str(i): [0] for i in range(9_999)}},
    ),
    "MixtralForCausalLM": (
        {"num_local_experts": _MANY}, {"num_local_experts": 10**7},
        {"num_local_experts": 10**6, "num_hidden_layers": 10**4},
        {"num_hidden_layers": 3_000, "num_local_experts": 3_000}, {"num_experts_per_tok": 10**9},
    ),
    "BertForSequenceClassification": (
        {"num_labels": _MANY}, {"num_labels": 10**7}, {"num_labels": 10**9}, {"num_labels": 10**30},
        {"id2label": {str(i): f"l{i}" for i in range(_MANY)}}, {"label2id": {f"l{i}": i for i in range(_MANY)}},
        {"num_hidden_layers": 100_000}, {"type_vocab_size": 10**12}, {"id2label": {"9" * 5000: "a"}},
        {"max_position_embeddings": 10**12}, {"pruned_heads": {str(i): list(range(1000)) for i in range(100)}},
        {"chunk_size_feed_forward": 10**9}, {"num_labels": -5},
    ),
    "T5Model": (
        {"num_layers": _MANY}, {"num_decoder_layers": 16_777_216}, {"d_kv": 10**9, "num_heads": 10**9},
        {"relative_attention_num_buckets": 10**12}, {"feed_forward_proj": "gated-" * 20_000},
        {"feed_forward_proj": "gated-" + "a" * 100_000},
    ),
    "SwinModel": (
        {"depths": [1] * _MANY, "num_heads": [1] * _MANY}, {"depths": [100_000, 100_000]}, {"depths": [1] * 64},
        {"depths": [1] * 9_999, "num_heads": [1] * 9_999}, {"window_size": 10**6}, {"window_size": 16_000},
        {"window_size": 3_000}, {"image_size": 10**6, "use_absolute_embeddings": True}, {"image_size": [10**6] * _MANY},
        {"depths": [30_000, 30_000], "num_heads": [1, 1]}, {"patch_size": 0}, {"window_size": [10**5, 10**5]},
    ),
    "ResNetModel": (
        {"hidden_sizes": [8] * _MANY, "depths": [1] * _MANY}, {"hidden_sizes": [8] * 9_999, "depths": [1] * 9_999},
        {"depths": [_MANY, _MANY]}, {"hidden_sizes": [10**9, 10**9]}, {"depths": [262_144] * 9_000},
        {"depths": [], "hidden_sizes": []}, {"hidden_sizes": [8] * 5000, "depths": [50] * 5000},
    ),
    "ConvNextModel": (
        {"depths": [1] * _MANY, "hidden_sizes": [8] * _MANY, "num_stages": _MANY}, {"depths": [10**5, 10**5]},
        {"num_stages": 10**9}, {"depths": [260_000, 1]}, {"drop_path_rate": 1e300},
    ),
    "Wav2Vec2Model": (
        {"conv_dim": [8] * _MANY, "conv_kernel": [3] * _MANY, "conv_stride": [2] * _MANY},
        {"conv_dim": [8] * 9_999, "conv_kernel": [3] * 9_999, "conv_stride": [2] * 9_999,
         "num_feat_extract_layers": 9_999},
        {"num_feat_extract_layers": _MANY}, {"num_conv_pos_embeddings": 10**9}, {"conv_kernel": [10**9, 10**9]},
        {"num_adapter_layers": _MANY, "add_adapter": True}, {"num_codevector_groups": 10**9},
    ),
    "SegformerModel": (
        {"num_encoder_blocks": _MANY}, {"depths": [1] * _MANY}, {"depths": [10**5] * 4}, {"num_encoder_blocks": 10**9},
        {"patch_sizes": [10**6] * 4}, {"hidden_sizes": [10**9] * 4},
    ),
    "CLIPModel": (
        {"text_config": {"num_hidden_layers": _MANY}}, {"vision_config": {"image_size": 10**7, "patch_size": 1}},
        {"vision_config": {"image_size": 50_000, "patch_size": 1}}, {"vision_config": {"num_hidden_layers": 10**9}},
        {"text_config": {"a": [[0] * 9_000] * 100}}, {"projection_dim": 10**15}, {"text_config": [1] * _MANY},
    ),
}  # fmt: skip


def _cases() -> Iterator[Case]:
    for architecture, config in _SMALL.items():
        named = {"architectures": [architecture], **config}
        yield f"{architecture}, small", named, "accept"
        for changes in _HOSTILE[architecture]:
            label = ", ".join(f"{key} = {reprlib.repr(value)[:30]}" for key, value in changes.items())
            yield f"{architecture}, {label}", _merged(named, changes), "either"
    for depth in (60, 900):
        yield f"{depth} lists in one another", {"architectures": ["GPT2Model"], "a": _nested(depth)}, "either"


def _first() -> dict[str, Any]:
    return {"architectures": ["GPT2Model"], **_SMALL["GPT2Model"]}


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """With what is changed in a table within changed there."""
    found = dict(config)
    for key, value in changes.items():
        tables = isinstance(value, dict) and isinstance(config.get(key), dict)
        found[key] = {**config[key], **value} if tables else value
    return found


def _nested(depth: int) -> Any:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


FULL = len(list(_cases()))

if __name__ == "__main__":
    main(("configs",))
