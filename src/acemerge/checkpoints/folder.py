"""A checkpoint folder in Hugging Face layout: `model.safetensors`, or shards with an index, and `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.adapter import Adapter
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.assets import MODEL_INDEX, is_asset, module_weights, with_asset_folders
from acemerge.checkpoints.float8 import QUANTISATION, Float8Scale, check_quantisation, dequantised, find_float8
from acemerge.checkpoints.header import FLOAT8, MAX_PARTS, TensorInfo, TensorSpec, parse_json, read_header
from acemerge.checkpoints.nearby import almost, paths_in, what_is_there
from acemerge.checkpoints.pickles import read_pickle
from acemerge.errors import CheckpointError
from acemerge.shapes import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SHARD_OF = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")
_PICKLE_FILE = re.compile(r".*\.(bin|pt|pth)")
CONVERT = "save it again with save_pretrained, which writes safetensors, or add --allow-pickle to read it as plain data"
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_CONFIG = 16 << 20
_MAX_DEPTH = 64


def is_model_file(name: str) -> bool:
    """Whether a file of this name would be taken for a part of the model in its folder."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None or is_asset(name)


@dataclass(frozen=True)
class _Format:
    """How weights are stored: the file names, and what lists the tensors of one file without their values."""

    single: str
    index: str
    shard: re.Pattern[str]
    file: re.Pattern[str]
    read: Callable[[Path], list[TensorInfo]]

    def has_some(self, names: Sequence[str]) -> bool:
        return any(name in (self.single, self.index) or self.shard.fullmatch(name) for name in names)


_SAFETENSORS = _Format(SINGLE, INDEX, _SHARD, re.compile(r"[\w.-]+\.safetensors"), read_header)
_PICKLED = _Format(
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"),
    re.compile(r"[\w.-]+\.bin"),
    read_pickle,
)
_FORMATS = (_SAFETENSORS, _PICKLED)


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
        stored = _read(self.places[name])
        if stored.dtype not in FLOAT8.values():
            return stored
        scale = self.scales.get(name)
        return dequantised(stored, *((_read(scale.info).view(scale.shape), scale.repeats) if scale else (None, ())))


def _read(info: TensorInfo) -> Tensor:
    spec = info.spec
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    if info.parts:
        return torch.cat([_read(part).flatten() for part in info.parts]).view(spec.shape)
    buffer = bytearray(spec.nbytes)
    descriptor = files.open_for_reading(info.file)
    try:
        files.read_into(descriptor, [memoryview(buffer)], info.offset, info.file)
    finally:
        files.close(descriptor)
    return torch.frombuffer(buffer, dtype=spec.dtype).view(spec.shape)


def has_weights(names: Sequence[str]) -> bool:
    """Whether a folder with these files has a model's weights."""
    return any(kind.has_some(names) for kind in _FORMATS)


def safetensors_in(root: Path, single: str) -> tuple[dict[Path, files.Fingerprint], list[TensorInfo]]:
    """The files and tensors of a folder whose weights have this name, or are the shards of its index; none where
    neither is.
    """
    stem = re.escape(single.removesuffix(".safetensors"))
    shard = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors")
    kind = replace(_SAFETENSORS, single=single, index=f"{single}.index.json", shard=shard)
    names = files.list_folder(root)
    found = _weight_files(root, names, kind) if kind.has_some(names) else []
    prints = {file: files.fingerprint(file) for file in found}
    return prints, list(_places(root, names, kind, prints, kind.read).values()) if prints else []


def needed_files(where: object, names: Sequence[str], allow_pickle: bool) -> list[str]:
    """Of all files of a model, those that a reader needs: weights, or the index that lists them, and assets.

    Raises CheckpointError when there are none that may be read.
    """
    assets = [name for name in names if is_asset(name)]
    whole = {kind.single for kind in _FORMATS} | {kind.index for kind in _FORMATS}
    if set(ADAPTER) <= set(names) and not whole & set(names):
        return [*assets, *ADAPTER]
    if not has_weights(names):
        inner = [name for name in names if "/" in name or name == MODEL_INDEX]
        instead = what_is_there(where, inner, within="/" if ":" in str(where) else ":")
        if instead:
            raise CheckpointError(where, *instead)
    kind = _format(where, names, allow_pickle)
    weights = kind.single if kind.single in names else kind.index
    if weights not in names:
        raise CheckpointError(where, f"has shards but no {kind.index}", "choose a revision that has it")
    return [*assets, weights]


def listed_files(root: Path, name: str) -> list[str]:
    """The weight files that the index `name` of a folder lists; none for any other file."""
    found = [_weight_map(root, kind).values() for kind in _FORMATS if kind.index == name]
    return sorted(set().union(*found))


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
    if not has_weights(names):
        instead = what_is_there(path, paths_in(root))
        if instead:
            raise CheckpointError(path, *instead)
    kind = _format(root, names, allow_pickle)
    config = read_config(root / CONFIG) if CONFIG in names else {}
    check_quantisation(config, root / CONFIG, dequantize)
    read = partial(read_header, float8=True) if dequantize and kind is _SAFETENSORS else kind.read
    prints = {file: files.fingerprint(file) for file in _weight_files(root, names, kind)}
    places = _places(root, names, kind, prints, read)
    assets = tuple(name for name in with_asset_folders(root, names) if is_asset(name) and _is_file(root, name))
    for name in module_weights(assets):
        file = contained(root, name)
        prints[file] = files.fingerprint(file)
        places |= _module_places(name, read_header(file, float8=dequantize))
    float8 = find_float8(config, places, root)
    tensors = {name: info.spec for name, info in places.items() if name not in float8.apart}
    plain = {key: value for key, value in config.items() if key != QUANTISATION}
    return Checkpoint(path, tensors, plain, assets, places, prints, scales=float8.scales, float8=float8.about)


def _places(
    root: Path,
    names: Sequence[str],
    kind: _Format,
    weight_files: Iterable[Path],
    read: Callable[[Path], list[TensorInfo]],
) -> dict[str, TensorInfo]:
    """Where every tensor of a folder is, its index checked."""
    places: dict[str, TensorInfo] = {}
    for file in weight_files:
        for info in read(file):
            name = info.spec.name
            if name in places:
                what = f"tensor {name!r} is also in {places[name].file.name}"
                raise CheckpointError(file, what, "keep one of the two shards' copies")
            places[name] = info
    if kind.index in names:
        _check_index(root, places, kind)
    return places


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


def _format(where: object, names: Sequence[str], allow_pickle: bool) -> _Format:
    """How the weights of a folder are stored. Safetensors win where both are there."""
    kinds = _FORMATS if allow_pickle else _FORMATS[:1]
    found = next((kind for kind in kinds if kind.has_some(names)), None)
    if found:
        return found
    if not allow_pickle and any(_PICKLES.fullmatch(name) for name in names):
        raise CheckpointError(where, "has only pickled weights, which can run code", CONVERT)
    cure = "name a folder with safetensors weights" + (", or the pickled file itself" if allow_pickle else "")
    raise CheckpointError(where, f"has neither {' nor '.join(f'{k.single} nor {k.index}' for k in kinds)}", cure)


def _weight_files(root: Path, names: list[str], kind: _Format) -> list[Path]:
    """The files that hold the weights, every one inside the folder."""
    if kind.single in names and kind.index in names:
        raise CheckpointError(root, f"has both {kind.single} and {kind.index}", "remove the one that is stale")
    shards = [name for name in names if kind.shard.fullmatch(name)]
    if kind.single in names:
        if shards:
            raise CheckpointError(root, f"has both {kind.single} and {shards[0]}", "remove the one that is stale")
        return [contained(root, kind.single)]
    if kind.index not in names:
        raise CheckpointError(root, f"has shards but no {kind.index}", "fetch the index file too")
    listed = sorted(set(_weight_map(root, kind).values()))
    for name in listed:
        if name not in names:
            raise CheckpointError(root / name, "is in the index but not in the folder", "fetch the missing shard")
    for name in shards:
        if name not in listed:
            raise CheckpointError(root / name, "is not in the index", "remove the stray shard or mend the index")
    return [contained(root, name) for name in listed]


def _weight_map(root: Path, kind: _Format) -> dict[str, str]:
    index = root / kind.index
    content = parse_json(files.read_small(contained(root, kind.index), MAX_CONFIG), index, parts=MAX_PARTS)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(index, "has no weight_map", "fetch the index again")
    for name, file in mapping.items():
        if not isinstance(file, str) or not kind.file.fullmatch(file):
            what = f"the weight_map sends {name[:80]!r} to {str(file)[:80]!r}, which is no file of this folder"
            raise CheckpointError(index, what, "mend the index: plain file names only")
    return mapping


def _check_index(root: Path, places: Mapping[str, TensorInfo], kind: _Format) -> None:
    mapping = _weight_map(root, kind)
    for name, file in mapping.items():
        if name not in places:
            raise CheckpointError(
                root / file, f"lacks tensor {name[:80]!r}, which the index puts there", "fetch it again"
            )
        if places[name].file != contained(root, file):
            what = f"the index puts tensor {name!r} there, but it is in {places[name].file.name}"
            raise CheckpointError(root / file, what, "mend the index")
    for name, info in places.items():
        if name not in mapping:
            raise CheckpointError(info.file, f"tensor {name!r} is not in the index", "mend the index")


def contained(root: Path, name: str) -> Path:
    """`root / name` with links resolved; CheckpointError when it leaves the folder.

    A Hub cache keeps files as links `snapshots/REV/name -> ../../blobs/HASH`: those blobs belong to the folder, and
    so do those that the models of one cache share, in `blobs` beside `models--ORG--NAME`. A model may lie in a folder
    of its snapshot.
    """
    target = files.resolve(root / name)
    homes = [root]
    snapshot = next((p for p in (root, *root.parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and (snapshot == root or _COMMIT.fullmatch(snapshot.name)):
        homes.append(snapshot.parent.parent / "blobs")
        if snapshot.parent.parent.name.startswith("models--"):
            homes.append(snapshot.parent.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(root / name, "is a link that leaves the folder", "copy the file into the folder")
    return target


def read_config(path: Path) -> Mapping[str, Any]:
    """`config.json` as a table; it is data, and no code that it names is ever loaded."""
    target = contained(path.parent, path.name)
    # transformers itself writes Infinity for some limits.
    text = files.read_small(target, MAX_CONFIG)
    config = parse_json(text, path, "fetch the file again", constants=True, parts=MAX_PARTS)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is no JSON object", "fetch the file again")
    if not _is_shallow(config):
        raise CheckpointError(path, f"is nested more than {_MAX_DEPTH} levels deep", "fetch the file again")
    return config


def _is_shallow(content: Any) -> bool:
    """Whether whoever walks `content` by recursion will come to an end of it."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for items in children for child in items if isinstance(child, dict | list)]
    return not level


def _is_file(root: Path, name: str) -> bool:
    return files.kind(contained(root, name)) == "file"
