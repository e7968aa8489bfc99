"""Which files of a folder hold its weights, in safetensors or pickled: one file, or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import MODEL_INDEX, is_asset
from acemerge.checkpoints.config import MAX_CONFIG
from acemerge.checkpoints.header import MAX_PARTS, TensorInfo, parse_json, read_header
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.nearby import what_is_there
from acemerge.checkpoints.pickles import read_pickle
from acemerge.errors import CheckpointError, Cure, fetching

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PICKLED_ADAPTER = "adapter_model.bin"
CONVERT = "save it again with save_pretrained, which writes safetensors, or add --allow-pickle to read it as plain data"
_INDEX_AGAIN = fetching("the index again")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_OF_SHARDS = re.compile(r"-\d{5}-of-\d{5}\.")
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")


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


SAFETENSORS = _Format(SINGLE, INDEX, _SHARD, re.compile(r"[\w.-]+\.safetensors"), read_header)
_PICKLED = _Format(
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"),
    re.compile(r"[\w.-]+\.bin"),
    read_pickle,
)
_FORMATS = (SAFETENSORS, _PICKLED)


def has_weights(names: Sequence[str]) -> bool:
    """Whether a folder with these files has a model's weights."""
    return any(kind.has_some(names) for kind in _FORMATS)


def safetensors_in(root: Path, single: str) -> tuple[dict[Path, files.Fingerprint], list[TensorInfo]]:
    """The files and tensors of a folder whose weights have this name, or are the shards of its index; none where
    neither is.
    """
    stem = re.escape(single.removesuffix(".safetensors"))
    shard = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors")
    kind = replace(SAFETENSORS, single=single, index=f"{single}.index.json", shard=shard)
    names = files.list_folder(root)
    found = weight_files(root, names, kind) if kind.has_some(names) else []
    prints = {file: files.fingerprint(file) for file in found}
    return prints, list(places_of(root, names, kind, prints, kind.read).values()) if prints else []


def needed_files(where: object, names: Sequence[str], allow_pickle: bool) -> list[str]:
    """Of all files of a model, those that a reader needs: weights, or the index that lists them, and assets.

    Raises CheckpointError when there are none that may be read.
    """
    assets = [name for name in names if is_asset(name)]
    if not has_weights(names):
        inner = [name for name in names if "/" in name or name == MODEL_INDEX]
        instead = what_is_there(where, inner, within="/" if ":" in str(where) else ":")
        if ADAPTER[0] in names and not (instead and adapter_weights(names) is None):
            return [
                *assets,
                ADAPTER[0],
                readable_adapter(where, names, allow_pickle, "choose a revision that has it"),
            ]
        instead = instead or _by_itself(names) or what_is_there(where, names)
        if instead:
            raise CheckpointError(where, *instead)
    kind = format_of(where, names, allow_pickle)
    weights = kind.single if kind.single in names else kind.index
    if weights not in names:
        raise CheckpointError(where, f"has shards but no {kind.index}", "choose a revision that has it")
    return [*assets, weights]


def adapter_weights(names: Collection[str]) -> str | None:
    """The file of an adapter's weights, if one is among the names. Safetensors win where both are there."""
    return next((name for name in (ADAPTER[1], PICKLED_ADAPTER) if name in names), None)


def readable_adapter(where: object, names: Collection[str], allow_pickle: bool, otherwise: str | Cure) -> str:
    """The same; CheckpointError where none is there, with the cure `otherwise`, or none that may be read."""
    found = adapter_weights(names)
    if found is None:
        raise CheckpointError(where, f"has {ADAPTER[0]} but no {ADAPTER[1]}", otherwise)
    if found == PICKLED_ADAPTER and not allow_pickle:
        raise CheckpointError(where, "has only pickled weights, which can run code", CONVERT)
    return found


def _by_itself(names: Sequence[str]) -> tuple[str, str] | None:
    """What is said of a repository with a file of weights of its own name; an id cannot name a file."""
    own = (name for name in names if SAFETENSORS.file.fullmatch(name) and name != ADAPTER[1])
    name = next((name for name in own if not _OF_SHARDS.search(name)), None)
    if name is None:
        return None
    cure = f"fetch {name}, as by hf download --local-dir FOLDER, and name FOLDER/{name}"
    return f"has {name}, and no {SINGLE}", cure


def listed_files(root: Path, name: str) -> list[str]:
    """The weight files that the index `name` of a folder lists; none for any other file."""
    found = [_weight_map(root, kind).values() for kind in _FORMATS if kind.index == name]
    return sorted(set().union(*found))


def format_of(where: object, names: Sequence[str], allow_pickle: bool) -> _Format:
    """How the weights of a folder are stored. Safetensors win where both are there."""
    kinds = _FORMATS if allow_pickle else _FORMATS[:1]
    found = next((kind for kind in kinds if kind.has_some(names)), None)
    if found:
        return found
    if not allow_pickle and any(_PICKLES.fullmatch(name) for name in names):
        raise CheckpointError(where, "has only pickled weights, which can run code", CONVERT)
    cure = "name a folder with safetensors weights" + (", or the pickled file itself" if allow_pickle else "")
    raise CheckpointError(where, f"has neither {' nor '.join(f'{k.single} nor {k.index}' for k in kinds)}", cure)


def weight_files(root: Path, names: list[str], kind: _Format) -> list[Path]:
    """The files that hold the weights, every one inside the folder."""
    if kind.single in names and kind.index in names:
        raise CheckpointError(root, f"has both {kind.single} and {kind.index}", "remove the one that is stale")
    shards = [name for name in names if kind.shard.fullmatch(name)]
    if kind.single in names:
        if shards:
            raise CheckpointError(root, f"has both {kind.single} and {shards[0]}", "remove the one that is stale")
        return [contained(root, kind.single)]
    if kind.index not in names:
        raise CheckpointError(root, f"has shards but no {kind.index}", fetching("the index file too"))
    listed = sorted(set(_weight_map(root, kind).values()))
    for name in listed:
        if name not in names:
            raise CheckpointError(root / name, "is in the index but not in the folder", fetching("the missing shard"))
    for name in shards:
        if name not in listed:
            raise CheckpointError(root / name, "is not in the index", "remove the stray shard or mend the index")
    return [contained(root, name) for name in listed]


def places_of(
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


def _weight_map(root: Path, kind: _Format) -> dict[str, str]:
    index = root / kind.index
    text = files.read_small(contained(root, kind.index), MAX_CONFIG)
    content = parse_json(text, index, _INDEX_AGAIN, parts=MAX_PARTS)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(index, "has no weight_map", _INDEX_AGAIN)
    for name, file in mapping.items():
        if not isinstance(file, str) or not kind.file.fullmatch(file):
            what = f"the weight_map sends {name[:80]!r} to {str(file)[:80]!r}, which is no file of this folder"
            raise CheckpointError(index, what, "mend the index: plain file names only")
    return mapping


def _check_index(root: Path, places: Mapping[str, TensorInfo], kind: _Format) -> None:
    mapping = _weight_map(root, kind)
    for name, file in mapping.items():
        if name not in places:
            what = f"lacks tensor {name[:80]!r}, which the index puts there"
            raise CheckpointError(root / file, what, fetching("it again, or mend the index"))
        if places[name].file != contained(root, file):
            what = f"the index puts tensor {name!r} there, but it is in {places[name].file.name}"
            raise CheckpointError(root / file, what, "mend the index")
    for name, info in places.items():
        if name not in mapping:
            raise CheckpointError(info.file, f"tensor {name!r} is not in the index", "mend the index")
