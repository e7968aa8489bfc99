"""The header of a safetensors file, read strictly.

The format is 8 bytes of little-endian length, that many bytes of JSON, then the tensors without a gap. The
reference reader accepts duplicate keys and hostile names, so the header is checked here in full before any
tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.pointers import LENGTH, check_fetched
from acemerge.errors import CheckpointError, Cure, fetching

MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_PARTS = 10 * MAX_TENSORS
_CURE = fetching("or save it again").because("the file is damaged or was not made by a safetensors writer")
_CUT = fetching("it again").because("the file is truncated or has bytes appended")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT8: dict[str, torch.dtype] = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Others (pt, np, mlx, none) lay tensors out as PyTorch does, and transformers names them so.
_TRANSPOSED = {"flax": "Flax", "tf": "TensorFlow"}
_UNSUPPORTED = re.compile(r"F8_|F4|F6_|U16|U32|U64|C64")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: the bytes of `spec` from `offset` in `file`.

    With `parts` it is their values one behind the other, as many for each of its rows. Where its name or its extent is
    not the file's own, `within` is the tensor of the file.
    """

    spec: TensorSpec
    file: Path
    offset: int
    parts: tuple[TensorInfo, ...] = ()
    within: TensorInfo | None = None

    @property
    def stored(self) -> TensorInfo:
        """The tensor that the file has there."""
        return self if self.within is None else self.within


def read_header(path: Path, float8: bool = False) -> list[TensorInfo]:
    """All tensors of one file, in the order of their bytes; CheckpointError where the file breaks the format.

    Those in fp8 are refused, too, unless `float8`.
    """
    size = files.fingerprint(path)[0]
    descriptor = files.open_for_reading(path)
    try:
        length = _header_length(descriptor, size, path)
        text = bytearray(length)
        files.read_into(descriptor, [memoryview(text)], 8, path)
    finally:
        files.close(descriptor)
    entries = parse_json(bytes(text), path, _CURE, parts=MAX_PARTS)
    if not isinstance(entries, dict):
        raise CheckpointError(path, "the header is no JSON object", _CURE)
    _check_metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        what = f"{len(entries):,} tensors, more than the {MAX_TENSORS:,} that a shard may hold"
        raise CheckpointError(path, what, "save it in more shards")
    types = DTYPES | FLOAT8 if float8 else DTYPES
    infos = [_tensor_info(name, entry, types, 8 + length, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.spec.nbytes))
    _check_layout(infos, 8 + length, size, path)
    return infos


def _header_length(descriptor: files.Handle, size: int, path: Path) -> int:
    if size < 8:
        raise CheckpointError(path, f"{size} bytes are too few for a safetensors file", _CURE)
    beginning = bytearray(min(size, LENGTH))
    files.read_into(descriptor, [memoryview(beginning)], 0, path)
    check_fetched(bytes(beginning), path)
    length = int.from_bytes(beginning[:8], "little")
    if length > size - 8:
        raise CheckpointError(path, f"a header of {length:,} bytes does not fit in a file of {size:,}", _CURE)
    if length > MAX_HEADER:
        raise CheckpointError(path, f"a header of {length:,} bytes is over the limit of {MAX_HEADER:,}", _CURE)
    return length


def parse_json(text: bytes, path: Path, cure: str | Cure, constants: bool = False, parts: int | None = None) -> Any:
    """JSON with duplicate keys, bottomless nesting and, unless `constants`, NaN and infinities refused.

    Also text of more than `parts` lists, tables and items: a few bytes of each take fifty of memory.
    """
    check_fetched(text, path)
    count = sum(map(text.count, (b"[", b"{", b",")))
    if parts is not None and count > parts:
        raise CheckpointError(path, f"{count:,} parts, more than the {parts:,} that its JSON may have", cure)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise CheckpointError(path, f"the key {twice[:80]!r} stands twice", cure)
        return result

    def no_constants(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        parse = None if constants else no_constants
        return json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=parse)
    except (ValueError, RecursionError) as failure:
        detail = str(failure)[:120] or type(failure).__name__
        raise CheckpointError(path, f"not valid JSON ({detail})", cure) from None


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__ is not a table of strings", _CURE)
    if metadata.get("format") in _TRANSPOSED:
        what = f"was saved by {_TRANSPOSED[metadata['format']]}, under other names and with its kernels transposed"
        raise CheckpointError(path, what, "load it with transformers, save it from PyTorch and name that folder")


def check_name(name: str, path: Path) -> None:
    """Refuse names that could be taken for a path or break a line."""
    path_like = name.startswith("/") or "\\" in name or ".." in name.split("/")
    if not name or len(name) > 512 or not name.isprintable() or path_like:
        raise CheckpointError(
            path, f"the tensor name {name[:80]!r} is not allowed", fetching("it again, or rename the tensor")
        )


def _tensor_info(name: str, entry: Any, types: Mapping[str, torch.dtype], data_start: int, path: Path) -> TensorInfo:
    check_name(name, path)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(path, f"the entry of tensor {name!r} is malformed", _CURE)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in types:
        if isinstance(dtype, str) and _UNSUPPORTED.match(dtype):
            cure = "add --dequantize" if dtype in FLOAT8 else "dequantise the checkpoint to bfloat16 first"
            cure = "save the checkpoint again without it, or as real numbers" if dtype == "C64" else cure
            raise CheckpointError(path, f"tensor {name!r} has the type {dtype}, which cannot be merged", cure)
        raise CheckpointError(path, f"tensor {name!r} has an unknown type {str(dtype)[:40]!r}", _CURE)
    if not _is_sizes(shape) or len(shape) > 16:
        raise CheckpointError(path, f"tensor {name!r} has a malformed shape", _CURE)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(path, f"tensor {name!r} has malformed data offsets", _CURE)
    spec = TensorSpec(sys.intern(name), types[dtype], tuple(shape))  # the same in every model
    if spec.nbytes != offsets[1] - offsets[0]:
        what = f"tensor {name!r} needs {spec.nbytes:,} bytes by its shape but has {offsets[1] - offsets[0]:,}"
        raise CheckpointError(path, what, _CURE)
    return TensorInfo(spec, path, data_start + offsets[0])


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _check_layout(infos: list[TensorInfo], start: int, size: int, path: Path) -> None:
    position = start
    for info in infos:
        if info.offset != position:
            what = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(path, f"tensor {info.spec.name!r} {what}", _CURE)
        position += info.spec.nbytes
    if position != size:
        what = f"{size:,} bytes long, but its header describes {position:,}"
        raise CheckpointError(path, what, _CUT)
