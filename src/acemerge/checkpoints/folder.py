"""A checkpoint folder in Hugging Face layout: `model.safetensors`, or shards with an index, and `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.adapter import Adapter
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.assets import is_asset, module_weights, with_asset_folders
from acemerge.checkpoints.config import CONFIG, read_config
from acemerge.checkpoints.float8 import QUANTISATION, Float8Scale, check_quantisation, dequantised, find_float8
from acemerge.checkpoints.header import FLOAT8, TensorInfo, TensorSpec, read_header
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.nearby import almost, paths_in, what_is_there
from acemerge.checkpoints.pickles import read_pickle
from acemerge.checkpoints.unfinished import check_finished
from acemerge.checkpoints.weight_files import (
    ADAPTER,
    CONVERT,
    SAFETENSORS,
    format_of,
    has_weights,
    places_of,
    weight_files,
)
from acemerge.errors import CheckpointError
from acemerge.shapes import Tensor

_SHARD_OF = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
_PICKLE_FILE = re.compile(r".*\.(bin|pt|pth)")


@dataclass(frozen=True)
class Checkpoint:
    """One opened checkpoint: headers read and checked, no tensor bytes yet.

    With an `adapter`, `tensors` are those of the base that it changes; what it does not name is the base's own.
    Tensors in fp8 stand for float32 values, by their `scales`, which are no tensors by themselves; `float8` describes
    them, and `config` says nothing of them. Of a model that is a part of its base alone, `absent` are the identities
    of the rest.
    """

    path: Path
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    assets: tuple[str, ...]
    places: Mapping[str, TensorInfo] = field(repr=False)
    fingerprints: Mapping[Path, files.Fingerprint] = field(repr=False)
    adapter: Adapter | None = None
    scales: Mapping[str, Float8Scale] = field(default_factory=dict, repr=False)
    float8: str = ""
    absent: frozenset[str] = frozenset()

    @property
    def weight_files(self) -> list[Path]:
        return list(self.fingerprints)

    def read(self, name: str) -> Tensor:
        """The tensor `name` in its stored type, float32 for fp8, on the CPU, in memory of its own."""
        stored = read_stored(self.places[name])
        if stored.dtype not in FLOAT8.values():
            return stored
        scale = self.scales.get(name)
        if scale is None:
            return dequantised(stored, None, ())
        return dequantised(stored, read_stored(scale.info).view(scale.shape), scale.repeats)


def read_stored(info: TensorInfo) -> Tensor:
    """One tensor of a file, or of an object, in its stored type."""
    spec = info.spec
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    if info.parts:
        return torch.cat([read_stored(part).flatten() for part in info.parts]).view(spec.shape)
    buffer = bytearray(spec.nbytes)
    descriptor = files.open_for_reading(info.file)
    try:
        files.read_into(descriptor, [memoryview(buffer)], info.offset, info.file)
    finally:
        files.close(descriptor)
    return torch.frombuffer(buffer, dtype=spec.dtype).view(spec.shape)


def open_checkpoint(path: Path, allow_pickle: bool = False, dequantize: bool = False) -> Checkpoint:
    """Open a folder: read and check its index and the header of every shard.

    With `allow_pickle` also a folder that has pickled weights only, or one pickled file; as data, never run. With
    `dequantize` also one with weights in fp8.

    Raises CheckpointError for a folder that is missing, incomplete, inconsistent or holds no weights.
    """
    root = files.resolve(path)
    there = files.kind(root)
    if there == "file" and _PICKLE_FILE.fullmatch(path.name):
        return _open_pickle(path, allow_pickle)
    if there == "file" and path.suffix == ".safetensors":
        return open_file(path, dequantize)
    if there != "folder":
        known = "name a checkpoint folder with model.safetensors in it, or a Hub id as org/name"
        cure = almost(path) or ("check the address" if scheme_of(path) else known)
        raise CheckpointError(path, "no such folder" if there == "nothing" else "not a folder", cure)
    names = files.list_folder(root)
    check_finished(path, names)
    if not has_weights(names):
        instead = what_is_there(path, paths_in(root))
        if instead:
            raise CheckpointError(path, *instead)
    kind = format_of(root, names, allow_pickle)
    config = read_config(root / CONFIG) if CONFIG in names else {}
    check_quantisation(config, root / CONFIG, dequantize)
    read = partial(read_header, float8=True) if dequantize and kind is SAFETENSORS else kind.read
    prints = {file: files.fingerprint(file) for file in weight_files(root, names, kind)}
    places = places_of(root, names, kind, prints, read)
    assets = tuple(name for name in with_asset_folders(root, names) if is_asset(name) and _is_file(root, name))
    for name in module_weights(assets):
        file = contained(root, name)
        prints[file] = files.fingerprint(file)
        places |= _module_places(name, read_header(file, float8=dequantize))
    float8 = find_float8(config, places, root)
    tensors = {name: info.spec for name, info in places.items() if name not in float8.apart}
    plain = {key: value for key, value in config.items() if key != QUANTISATION}
    return Checkpoint(path, tensors, plain, assets, places, prints, scales=float8.scales, float8=float8.about)


def _module_places(file: str, infos: Sequence[TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a module behind the transformer, its folder before their names."""
    named = [(f"{file.split('/')[0]}/{info.spec.name}", info) for info in infos]
    return {name: replace(info, spec=replace(info.spec, name=name), within=info) for name, info in named}


def _open_pickle(path: Path, allow_pickle: bool) -> Checkpoint:
    """One pickled file by itself: no configuration, so its tensors are told by name and shape."""
    if not allow_pickle:
        raise CheckpointError(path, "is pickled, which can run code", CONVERT)
    prints = {path: files.fingerprint(path)}
    places = {info.spec.name: info for info in read_pickle(path)}
    return Checkpoint(path, {name: info.spec for name, info in places.items()}, {}, (), places, prints)


def open_file(path: Path, dequantize: bool = False) -> Checkpoint:
    """One safetensors file by itself: no configuration, so its tensors are told by name and shape."""
    shard = _SHARD_OF.fullmatch(path.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(path, f"is one of {int(shard[1])} shards of a model", "name its folder")
    if path.name == ADAPTER[1]:
        raise CheckpointError(path, f"is an adapter without its {ADAPTER[0]}", "name its folder")
    places = {info.spec.name: info for info in read_header(path, float8=dequantize)}
    float8 = find_float8({}, places, path)
    tensors = {name: info.spec for name, info in places.items() if name not in float8.apart}
    prints = {path: files.fingerprint(path)}
    return Checkpoint(path, tensors, {}, (), places, prints, scales=float8.scales, float8=float8.about)


def _is_file(root: Path, name: str) -> bool:
    return files.kind(contained(root, name)) == "file"
