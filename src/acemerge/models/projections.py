"""Weights that hold a layer's query, key and value projections in one, and how their rows lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acemerge.shapes import Float, Tensor

_FUSED = re.compile(r"(?:^|[._])(c_attn|in_proj_weight|query_key_value|qkv|qkv_proj|wqkv)(?:\.weight)?$", re.IGNORECASE)
# Architectures that store `query_key_value` head by head: q, k and v of the first, of the second, ...
_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "falcon")


@dataclass(frozen=True)
class Fused:
    """`groups` blocks of rows, each with `sizes` rows of every projection."""

    groups: int
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.groups * sum(self.sizes)

    def split(self, x: Float[Tensor, "*T out in"]) -> list[Tensor]:
        """The projections' own matrices, (*T, groups size, in) each."""
        blocks = x.unflatten(-2, (self.groups, sum(self.sizes)))
        return [part.flatten(-3, -2) for part in blocks.split(self.sizes, dim=-2)]

    def join(self, parts: Sequence[Float[Tensor, "part in"]]) -> Float[Tensor, "out in"]:
        """The inverse of `split`, for one weight."""
        blocks = [part.unflatten(-2, (self.groups, size)) for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(blocks, dim=-2).flatten(-3, -2)


def fused_projections(name: str, out: int, config: Mapping[str, Any]) -> Fused | None:
    """How the rows of a weight (out, in) of this name lie, None where it is not fused or the config does not tell."""
    found = _FUSED.search(name)
    if not found:
        return None
    heads, shared, width = _heads(config)
    if found[1] == "query_key_value" and config.get("model_type") in _BY_HEAD:
        fused = _by_head(config, heads, shared, width)
    else:
        fused = Fused(1, (heads * width, shared * width, shared * width))
        if fused.rows != out and out % 3 == 0:  # another tower than the one that the config's heads are of
            fused = Fused(1, (out // 3,) * 3)
    return fused if fused.rows == out and min(fused.sizes) > 0 else None


def _by_head(config: Mapping[str, Any], heads: int, shared: int, width: int) -> Fused:
    if config.get("model_type") == "falcon":
        if config.get("new_decoder_architecture"):
            return Fused(shared, (heads // max(1, shared) * width, width, width))
        if config.get("multi_query", True):
            return Fused(1, (heads * width, width, width))
    return Fused(heads, (width,) * 3)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key and value heads, and rows of each; zeros where the config does not say."""
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    shared = _number(config, "num_key_value_heads", "num_kv_heads") or (1 if config.get("multi_query") else heads)
    return heads, shared, _number(config, "head_dim") or hidden // max(1, heads)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these keys that holds a positive whole number."""
    return next((v for v in map(config.get, names) if isinstance(v, int) and v > 0), 0)
