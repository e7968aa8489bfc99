"""A checkpoint folder in Hugging Face layout: `model.safetensors`, or shards with an index, and `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.header import TensorInfo, TensorSpec, parse_json, read_header
from acemerge.errors import CheckpointError
from acemerge.shapes import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")
MAX_CONFIG = 16 << 20


def is_model_file(name: str) -> bool:
    """Whether a file of this name would be taken for a part of the model in its folder."""
    return name in (SINGLE, INDEX) or any(kind.fullmatch(name) is not None for kind in (_SHARD, _ASSET))


# What a model needs beside its weights: configuration, tokenizer and processor files. Never code, never pickles.
_ASSET = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab_\w+"
    r"|preprocessor_config|processor_config|image_processor_config|video_preprocessor_config|chat_template"
    r"|config_sentence_transformers|sentence_bert_config|normalizer|encoder|entity_vocab|tekken)\.json"
    r"|vocab\.txt|merges\.txt|bpe\.codes|vocab\.bpe|chat_template\.jinja"
    r"|tokenizer\.model|spiece\.model|spm\.model|sentencepiece(\.bpe)?\.model|source\.spm|target\.spm"
)


@dataclass(frozen=True)
class Checkpoint:
    """One opened checkpoint: headers read and checked, no tensor bytes yet."""

    path: Path
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    assets: tuple[str, ...]
    _places: Mapping[str, TensorInfo] = field(repr=False)
    _fingerprints: Mapping[Path, tuple[int, int]] = field(repr=False)

    @property
    def weight_files(self) -> list[Path]:
        return list(self._fingerprints)

    def read(self, name: str) -> Tensor:
        """The tensor `name` in its stored type, on the CPU, in memory of its own."""
        info, spec = self._places[name], self.tensors[name]
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        buffer = bytearray(spec.nbytes)
        with files.reading(info.file):
            descriptor = files.open_for_reading(info.file)
        try:
            files.read_into(descriptor, memoryview(buffer), info.offset, info.file)
        finally:
            files.close(descriptor)
        return torch.frombuffer(buffer, dtype=spec.dtype).view(spec.shape)

    def check_unchanged(self) -> None:
        """CheckpointError when a weight file was written since it was opened."""
        for path, before in self._fingerprints.items():
            if files.fingerprint(path) != before:
                raise CheckpointError(path, "changed during the run", "let nobody write to the inputs and run again")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder: read and check its index and the header of every shard.

    Raises CheckpointError for a folder that is missing, incomplete, inconsistent or holds no safetensors.
    """
    with files.reading(path):
        if not path.is_dir():
            cure = "name a checkpoint folder with model.safetensors in it"
            raise CheckpointError(path, "not a folder" if path.exists() else "no such folder", cure)
        root = path.resolve()
    names = files.list_folder(root)
    weight_files = _weight_files(root, names)
    prints = {file: files.fingerprint(file) for file in weight_files}
    places: dict[str, TensorInfo] = {}
    for file in weight_files:
        for info in read_header(file):
            name = info.spec.name
            if name in places:
                what = f"tensor {name!r} is also in {places[name].file.name}"
                raise CheckpointError(file, what, "keep one of the two shards' copies")
            places[name] = info
    if INDEX in names:
        _check_index(root, places)
    config = read_config(root / CONFIG) if CONFIG in names else {}
    assets = tuple(name for name in names if _ASSET.fullmatch(name) and _is_asset(root, name))
    tensors = {name: info.spec for name, info in places.items()}
    return Checkpoint(path, tensors, config, assets, places, prints)


def open_file(path: Path) -> Checkpoint:
    """One safetensors file by itself."""
    places = {info.spec.name: info for info in read_header(path)}
    tensors = {name: info.spec for name, info in places.items()}
    return Checkpoint(path, tensors, {}, (), places, {path: files.fingerprint(path)})


def _weight_files(root: Path, names: list[str]) -> list[Path]:
    """The files that hold the weights, every one inside the folder."""
    if SINGLE in names and INDEX in names:
        raise CheckpointError(root, f"has both {SINGLE} and {INDEX}", "remove the one that is stale")
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if SINGLE in names:
        if shards:
            raise CheckpointError(root, f"has both {SINGLE} and {shards[0]}", "remove the one that is stale")
        return [contained(root, SINGLE)]
    if INDEX not in names:
        if shards:
            raise CheckpointError(root, f"has shards but no {INDEX}", "fetch the index file too")
        if any(_PICKLES.fullmatch(name) for name in names):
            cure = "save it again with save_pretrained, which writes safetensors"
            raise CheckpointError(root, "has only pickled weights, which can run code", cure)
        raise CheckpointError(root, f"has neither {SINGLE} nor {INDEX}", "name a folder with safetensors weights")
    listed = sorted(set(_weight_map(root).values()))
    for name in listed:
        if name not in names:
            raise CheckpointError(root / name, "is in the index but not in the folder", "fetch the missing shard")
    for name in shards:
        if name not in listed:
            raise CheckpointError(root / name, "is not in the index", "remove the stray shard or mend the index")
    return [contained(root, name) for name in listed]


def _weight_map(root: Path) -> dict[str, str]:
    index = root / INDEX
    content = parse_json(files.read_small(contained(root, INDEX), MAX_CONFIG), index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(index, "has no weight_map", "fetch the index again")
    for name, file in mapping.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            what = f"the weight_map sends {name[:80]!r} to {str(file)[:80]!r}, which is no file of this folder"
            raise CheckpointError(index, what, "mend the index: plain file names only")
    return mapping


def _check_index(root: Path, places: Mapping[str, TensorInfo]) -> None:
    mapping = _weight_map(root)
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

    A Hub cache keeps files as links `snapshots/REV/name -> ../../blobs/HASH`: those blobs belong to the folder.
    """
    with files.reading(root / name):
        target = (root / name).resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(root / name, "is a link that leaves the folder", "copy the file into the folder")
    return target


def read_config(path: Path) -> Mapping[str, Any]:
    """`config.json` as a table; it is data, and no code that it names is ever loaded."""
    target = contained(path.parent, path.name)
    # transformers itself writes Infinity for some limits.
    config = parse_json(files.read_small(target, MAX_CONFIG), path, "fetch the file again", constants=True)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is no JSON object", "fetch the file again")
    if "quantization_config" in config:
        cure = "merge the unquantised checkpoint, or dequantise it first"
        raise CheckpointError(path, "the checkpoint is quantised", cure)
    return config


def _is_asset(root: Path, name: str) -> bool:
    return contained(root, name).is_file()
