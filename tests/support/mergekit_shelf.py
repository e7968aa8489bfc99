"""Tiny Llama models for mergekit recipes, what we make of a recipe, and what mergekit itself makes of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import load_folder, write_checkpoint
from torch import Tensor

import acemerge
from acemerge import api
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import load_recipe

Tensors = dict[str, Tensor]


def llama_tensors(layers: int = 4) -> Tensors:
    """Names and shapes of a tiny Llama, values as a trained one has them."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (16,)
    return {
        name: (1.0 if "norm" in name else 0.0) + 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 16}
LLAMA |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LLAMA |= {"intermediate_size": 24, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}


def make_shelf(root: Path) -> Path:
    """`f32/base`, `f32/a`, ... and the same in bf16."""
    base, generator = llama_tensors(), torch.Generator().manual_seed(1)
    for name in ("base", "a", "b", "c"):
        moved = {n: v + (name != "base") * 0.02 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        for folder, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            config = LLAMA | {"torch_dtype": str(dtype).removeprefix("torch.")}
            write_checkpoint(root / folder / name, {n: v.to(dtype) for n, v in moved.items()}, config)
    return root


def merged(shelf: Path, recipe: dict[str, Any], name: str = "ours") -> Tensors:
    """What the recipe, written into the shelf, gives."""
    (shelf / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    api.run_recipe(load_recipe(shelf / f"{name}.yml", {}), shelf / name, RunOptions(overwrite=True))
    return load_folder(shelf / name)


def read(shelf: Path, folder: str = "f32") -> dict[str, Tensors]:
    return {name: load_folder(shelf / folder / name) for name in ("base", "a", "b", "c")}


def model(path: str, **parameters: Any) -> dict[str, Any]:
    return {"model": path, "parameters": parameters} if parameters else {"model": path}


def on(path: str) -> Callable[..., dict[str, Any]]:
    return lambda **parameters: model(path, **parameters)


def layers_of(path: str) -> Callable[..., dict[str, Any]]:
    """A source of a slice, from its first layer and the one behind its last."""
    return lambda first, end, **parameters: {**model(path, **parameters), "layer_range": [first, end]}


def stack(method: str, *slices: Any, base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """A recipe of slices, each a list of its sources or the whole table."""
    tables = [part if isinstance(part, dict) else {"sources": part} for part in slices]
    return {"merge_method": method, "slices": tables, "parameters": parameters, "base_model": base}


PEERS = Path(os.environ.get("ACEMERGE_MERGEKIT", Path(__file__).parents[2] / ".peers" / "bin" / "mergekit-yaml"))
beside_mergekit = pytest.mark.skipif(not PEERS.exists(), reason="no mergekit: run benchmarks/setup_peers.sh")

# One process for all recipes: starting mergekit takes longer than such a merge.
_DRIVER = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name in sys.argv[1:]:
    with open(f"{name}.yml") as file:
        recipe = MergeConfiguration.model_validate(yaml.safe_load(file))
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, lora_merge_cache="merged-adapters")
    run_merge(recipe, f"theirs-{name}", options)
"""


def by_mergekit(shelf: Path, cases: Mapping[str, dict[str, Any]], before: str = "", path: str = "") -> None:
    """What mergekit makes of every recipe, in `theirs-NAME`; `before` is Python that runs first, `path` its modules."""
    for name, recipe in cases.items():
        (shelf / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [PEERS.parent / "python", "-c", before + _DRIVER, *cases]
    done = subprocess.run(command, cwd=shelf, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def by(name: str, deltas: Tensor, weights: list[float] | None = None, **params: Any) -> Tensor:
    """What a rule makes of task vectors."""
    return acemerge.merge_deltas(deltas, name, weights=weights, **params).delta
