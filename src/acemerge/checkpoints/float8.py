"""Weights stored in fp8 with scales beside them: which belongs to which, and the values that they stand for.

The layouts are those of fine-grained fp8 (DeepSeek, Qwen3: `weight_scale_inv`, a scale for each block of 128 x 128),
and of compressed-tensors, FBGEMM and ModelOpt (`weight_scale`, for a tensor, a row or a block). By either name the
scale is a factor on the stored values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints.header import FLOAT8, TensorInfo, TensorSpec
from acemerge.errors import CheckpointError, fetching
from acemerge.shapes import Float, Tensor

QUANTISATION = "quantization_config"
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_PLAIN = {"float32": torch.float32, "float16": torch.float16}
_SCALES = ("_scale_inv", "_scale")
# Of activations and of the cache: a weight does not depend on them.
_OF_ACTIVATIONS = re.compile(r".*[._](input|output|activation|[qkv]|prob)_scale(_ub)?")
_UNQUANTISED = "merge the checkpoint that it was made from"
_CURES = {
    "bitsandbytes": "load it with transformers and bitsandbytes, call dequantize(), save it and name that folder",
    # Saved in the original format, transformers 5 names the plain weights as if they were packed.
    "mxfp4": "load it by transformers with Mxfp4Config(dequantize=True), call save_pretrained(folder, "
    "save_original_format=False) and name that folder",
}


@dataclass(frozen=True)
class Float8Scale:
    """Where a weight's scale lies, its shape beside the weight's, and for how many entries along each side one is."""

    info: TensorInfo
    shape: tuple[int, ...]
    repeats: tuple[int, ...]


@dataclass(frozen=True)
class Float8:
    """The scales of a checkpoint's fp8 tensors by their names, and what else is no weight."""

    scales: Mapping[str, Float8Scale]
    apart: frozenset[str]
    about: str


def dequantised(
    stored: Float[Tensor, "*shape"], scale: Tensor | None, repeats: tuple[int, ...], first: int = 0
) -> Float[Tensor, "*shape"]:
    """`W[i, j] = stored[i, j] * scale[i // r_0, j // r_1]` in float32, of every further side likewise.

    `stored` begins at the row `first` of the tensor that `scale` is for; without a scale its values are as they are.
    The product is rounded once, to float32.
    """
    W = stored.to(torch.float32)
    if scale is None:
        return W
    factor = scale.to(torch.float32)
    for side, repeat in enumerate(repeats):
        if factor.shape[side] == 1 or side == W.ndim - 1:
            continue  # broadcast, or below
        begin = first if side == 0 else 0
        factor = factor.index_select(side, torch.arange(begin, begin + W.shape[side]) // repeat)
    if factor.ndim == 0 or factor.shape[-1] in (1, W.shape[-1]):
        return W.mul_(factor)
    for part, column in zip(W.split(repeats[-1], -1), factor.split(1, -1), strict=True):
        part.mul_(column)  # never as large as W itself
    return W


def plain(spec: TensorSpec, config: Mapping[str, Any]) -> TensorSpec:
    """The tensor as it is written: one in fp8 in the type that the configuration names, else in bfloat16."""
    if spec.dtype not in FLOAT8.values():
        return spec
    named = str(config.get("dtype", config.get("torch_dtype")))
    return replace(spec, dtype=_PLAIN.get(named, torch.bfloat16))


def check_quantisation(config: Mapping[str, Any], path: Path, dequantize: bool) -> None:
    """CheckpointError for a configuration that says that weights are quantised, unless in fp8 and asked for."""
    if QUANTISATION not in config:
        return
    settings = config[QUANTISATION]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in _METHODS:
        what = f"the checkpoint is quantised ({str(method)[:40]})"
        raise CheckpointError(path, what, _CURES.get(str(method), _UNQUANTISED))
    if settings.get("transform_config"):
        raise CheckpointError(path, "the checkpoint is quantised and its weights are rotated", _UNQUANTISED)
    if not dequantize:
        what = f"the checkpoint is quantised ({method})"
        cure = f"{_UNQUANTISED}, or add --dequantize"
        raise CheckpointError(path, what, cure)


def find_float8(config: Mapping[str, Any], places: Mapping[str, TensorInfo], root: Path) -> Float8:
    """Every fp8 tensor with its scale.

    Raises CheckpointError for a tensor whose scale is missing or does not fit, and for one of packed integers.
    """
    told = QUANTISATION in config
    scales: dict[str, Float8Scale] = {}
    for name, info in places.items():
        if info.spec.dtype in FLOAT8.values():
            found = next((name + suffix for suffix in _SCALES if name + suffix in places), None)
            if found is not None:
                scales[name] = _scale(info.spec, places[found], _block(config), root)
            elif told:
                raise CheckpointError(root, f"tensor {name!r} is in fp8 and its scale is missing", fetching("it again"))
    apart = {scale.info.spec.name for scale in scales.values()}
    if told:
        apart |= {name for name in places if _OF_ACTIVATIONS.fullmatch(name)}
        _check_others({name: info.spec for name, info in places.items() if name not in apart}, root)
    kinds = sorted({key for name in places for key, dtype in FLOAT8.items() if places[name].spec.dtype == dtype})
    count = sum(info.spec.dtype in FLOAT8.values() for info in places.values())
    about = f"{count:,} tensors of {', '.join(kinds)}, {len(scales):,} with scales" if count else ""
    return Float8(scales, frozenset(apart), about)


def _check_others(specs: Mapping[str, TensorSpec], root: Path) -> None:
    """What is left beside fp8 weights and their scales is plain."""
    for name, spec in specs.items():
        if any(name.endswith(suffix) and name.removesuffix(suffix) in specs for suffix in _SCALES):
            raise CheckpointError(root, f"tensor {name!r} is the scale of a tensor that is not in fp8", _UNQUANTISED)
        if not spec.dtype.is_floating_point and (len(spec.shape) > 1 or "weight" in name):
            raise CheckpointError(root, f"tensor {name!r} of {spec.dtype} is no plain fp8", _UNQUANTISED)


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (rows, columns) that one scale is for, where scales are by block."""
    settings = config.get(QUANTISATION)
    if not isinstance(settings, dict):
        return None
    found = [settings.get("weight_block_size")]
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    blocks = [b for b in found if isinstance(b, list) and len(b) == 2 and all(type(n) is int and n > 0 for n in b)]
    return (blocks[0][0], blocks[0][1]) if blocks else None


def _scale(weight: TensorSpec, found: TensorInfo, block: tuple[int, int] | None, root: Path) -> Float8Scale:
    """The scale of a weight: one for all of it, for each row, for each block, or whatever broadcasts with it."""
    sides, shape = weight.shape, found.spec.shape
    if all(side == 1 for side in shape):
        shape = (1,) * len(sides)
    elif len(shape) == 1 and len(sides) == 2:
        shape = (*shape, 1)
    if len(shape) == len(sides) and found.spec.dtype.is_floating_point:
        blocks = ((1,) * len(sides) + (block or (1, 1)))[2:]
        repeats = tuple(_repeat(n, s, b) for n, s, b in zip(sides, shape, blocks, strict=True))
        if all(repeats):
            return Float8Scale(found, shape, repeats)
    about = f"{found.spec.dtype}, shape {list(found.spec.shape)}"
    what = f"tensor {weight.name!r} of shape {list(sides)} has a scale that does not fit: {about}"
    raise CheckpointError(root, what, _UNQUANTISED)


def _repeat(entries: int, scales: int, block: int) -> int:
    """Entries for each scale along one side, 0 where they do not fit."""
    if scales == 1:
        return max(1, entries)
    if scales == entries:
        return 1
    return block if scales == -(-entries // block) else 0
