"""Fused query, key and value: how their rows lie, told by what the architecture computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers
from builders import load_folder, make_model, perturb
from oracles import relative_error

import acemerge
from acemerge.errors import UsageError
from acemerge.models.projections import Fused, fused_projections

HEADS, HIDDEN = 4, 16


def _neox() -> tuple[torch.nn.Module, str]:
    config = transformers.GPTNeoXConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=8, vocab_size=8
    )
    return transformers.GPTNeoXForCausalLM(config), "gpt_neox.layers.0.attention.query_key_value"


def _bloom() -> tuple[torch.nn.Module, str]:
    config = transformers.BloomConfig(hidden_size=HIDDEN, n_head=HEADS, n_layer=1, vocab_size=8)
    return transformers.BloomForCausalLM(config), "transformer.h.0.self_attention.query_key_value"


def _falcon(**kind: Any) -> tuple[torch.nn.Module, str]:
    config = transformers.FalconConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1, vocab_size=8, alibi=False, **kind
    )
    return transformers.FalconForCausalLM(config), "transformer.h.0.self_attention.query_key_value"


def _phi3() -> tuple[torch.nn.Module, str]:
    config = transformers.Phi3Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=2, num_hidden_layers=1,
        intermediate_size=8, vocab_size=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config), "model.layers.0.self_attn.qkv_proj"


def _gpt2() -> tuple[torch.nn.Module, str]:
    config = transformers.GPT2Config(n_embd=HIDDEN, n_head=HEADS, n_layer=1, vocab_size=8, n_positions=16)
    return transformers.GPT2LMHeadModel(config), "transformer.h.0.attn.c_attn"


ARCHITECTURES = {
    "gpt_neox": _neox,
    "bloom": _bloom,
    "falcon, one key": lambda: _falcon(new_decoder_architecture=False, multi_query=True),
    "falcon, shared keys": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon, by head": lambda: _falcon(new_decoder_architecture=False, multi_query=False),
    "phi3": _phi3,
    "gpt2": _gpt2,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_what_the_attention_passes_on(architecture: str) -> None:
    """With queries of zero every token gets the mean of all values, whatever the keys; and nothing without values.

    So the model's output does not depend on the key rows, and is that of an empty attention without value rows.
    """
    model, name = ARCHITECTURES[architecture]()
    model.double().eval()
    layer = model.get_submodule(name)
    layer.weight.data *= 50  # as they are drawn, all tokens look alike
    transposed = isinstance(layer, transformers.pytorch_utils.Conv1D)
    stored = layer.weight.detach().clone()
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)
    weight = stored.T if transposed else stored
    fused = fused_projections(f"{name}.weight", len(weight), model.config.to_dict())
    assert fused is not None
    q, k, v = fused.split(weight)
    assert torch.equal(fused.join([q, k, v]), weight)

    def logits(*parts: torch.Tensor) -> torch.Tensor:
        joined = fused.join(parts)
        layer.weight.data = (joined.T if transposed else joined).contiguous()
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor([[1, 2, 3, 4]])).logits
        return found

    zero = torch.zeros_like
    whole, no_query = logits(q, k, v), logits(zero(q), k, v)
    assert relative_error(logits(zero(q), 3 * k, v), no_query) < 1e-12
    assert relative_error(logits(q, zero(k), v), no_query) < 1e-12
    assert relative_error(logits(q, k, zero(v)), logits(zero(q), zero(k), zero(v))) < 1e-12
    assert relative_error(whole, no_query) > 1e-4
    assert relative_error(no_query, logits(zero(q), k, zero(v))) > 1e-4


def test_a_weight_that_is_not_fused_or_not_understood_stays_whole() -> None:
    config = {"num_attention_heads": HEADS, "hidden_size": HIDDEN}
    assert fused_projections("layers.0.q_proj.weight", HIDDEN, config) is None
    assert fused_projections("layers.0.qkv.weight", 3 * HIDDEN + 1, config) is None
    assert fused_projections("visual.qkv.weight", 24, config) == Fused(1, (8, 8, 8))
    assert fused_projections("attn.in_proj_weight", 3 * HIDDEN, {}) == Fused(1, (HIDDEN,) * 3)


def test_the_rule_gets_the_projections_one_by_one(tmp_path: Path) -> None:
    base = make_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    experts = []
    for seed in (1, 2, 3):
        perturb(make_model("gpt2"), seed).save_pretrained(tmp_path / f"e{seed}")
        experts.append(tmp_path / f"e{seed}")
    report = acemerge.merge(tmp_path / "base", experts, "ace", out=tmp_path / "out", split_qkv=True)
    name = "transformer.h.0.attn.c_attn.weight"
    W0 = load_folder(tmp_path / "base")[name].double()
    deltas = torch.stack([load_folder(e)[name].double() - W0 for e in experts]).mT
    expected = W0 + torch.cat([oracles.ace(part) for part in deltas.chunk(3, dim=1)]).mT
    assert relative_error(load_folder(tmp_path / "out")[name], expected) < 1e-5
    assert report.tensors[name]["reason"].endswith("q, k and v apart")
    assert len(report.tensors[name]["projections"]) == 3
    with pytest.raises(UsageError, match="split_qkv"):
        acemerge.merge(tmp_path / "base", experts, policy="paper", split_qkv=True)
