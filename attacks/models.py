"""Checkpoints made byte by byte, with no library between: also such as no library would write."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = {"model_type": "nobody", "hidden_size": 4}

# name -> (type, shape): enough of a model for a plan
Tensors = Mapping[str, tuple[str, Sequence[int]]]
TENSORS: Tensors = {
    "embed.weight": ("F32", (5, 4)),
    "layers.0.up.weight": ("BF16", (6, 4)),
    "layers.0.up.bias": ("F32", (6,)),
    "layers.0.none.weight": ("F16", (0, 4)),
    "layers.0.down.weight": ("F32", (4, 6)),
    "scale": ("F64", ()),
    "position_ids": ("I64", (3,)),
}


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    size = SIZES[dtype]
    for side in shape:
        size *= side
    return size


def entries(tensors: Tensors) -> dict[str, Any]:
    """The header's table of tensors that lie one behind the other."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + nbytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return table


def data(tensors: Tensors) -> bytes:
    """Values for the tensors: small numbers, finite in every type."""
    total = sum(nbytes(dtype, shape) for dtype, shape in tensors.values())
    return bytes(total)


def framed(header: bytes, values: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + values


def content(tensors: Tensors) -> bytes:
    return framed(json.dumps(entries(tensors)).encode(), data(tensors))


def overwrite(path: Path, content: bytes) -> None:
    """Replace a file's content in place: emptying it first costs a flush to the disk on some file systems."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()


def write_single(folder: Path, tensors: Tensors = TENSORS, config: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SINGLE).write_bytes(content(tensors))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def shard_name(i: int, total: int) -> str:
    return f"model-{i:05d}-of-{total:05d}.safetensors"


def split(tensors: Tensors, total: int) -> list[Tensors]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::total]} for i in range(total)]


def weight_map(shards: Sequence[Tensors]) -> dict[str, str]:
    return {name: shard_name(i, len(shards)) for i, shard in enumerate(shards, 1) for name in shard}


def write_sharded(folder: Path, total: int = 2, tensors: Tensors = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(tensors, total)
    for i, shard in enumerate(shards, 1):
        (folder / shard_name(i, total)).write_bytes(content(shard))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map(shards)}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
