"""A LoRA adapter in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

The configuration is read as data. What it may say is listed here: a feature that is not known to leave the merged
weights alone is refused, never passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.adapter import Adapter, Update
from acemerge.checkpoints.folder import (
    ADAPTER,
    CONVERT,
    INDEX,
    SINGLE,
    Checkpoint,
    contained,
    open_checkpoint,
    read_config,
)
from acemerge.checkpoints.header import TensorInfo, TensorSpec, read_header
from acemerge.checkpoints.pickles import read_pickle
from acemerge.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_MODEL = ADAPTER
_PICKLED_MODEL = "adapter_model.bin"
PREFIX = "base_model.model."

# Keys that say how an adapter was trained or found, not what its weights are. Which way a layer is stored
# (`fan_in_fan_out`) the base itself tells; what was saved whole (`modules_to_save`) the tensors tell.
# fmt: off
_HARMLESS = frozenset((
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "modules_to_save", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"
))
_READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "init_lora_weights"
))
# fmt: on
# Other beginnings change the base's own weights too, and are written down nowhere.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")
_MERGE_FIRST = "merge it into its base with peft (merge_and_unload) and name that folder"

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[\w-]+)?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[\w-]+)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.[\w-]+)?(\.weight)?")


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter in it."""
    return files.kind(files.resolve(path)) == "folder" and ADAPTER_CONFIG in files.list_folder(path)


def base_of(path: Path) -> str | None:
    """What an adapter's configuration says that it was trained on: a Hub id, or a path that is not to be trusted."""
    config = read_config(files.resolve(path) / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        return None
    return f"{base}@{revision}" if isinstance(revision, str) and revision else base


def open_expert(path: Path, allow_pickle: bool = False, dequantize: bool = False) -> Checkpoint:
    """Open a checkpoint, or an adapter: headers and configuration only.

    Raises CheckpointError for what neither is, and for an adapter that cannot be read in full.
    """
    return open_adapter(path, allow_pickle) if is_adapter(path) else open_checkpoint(path, allow_pickle, dequantize)


def open_adapter(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """An adapter as a checkpoint whose `tensors` are those of the base that it changes.

    The tensors that it holds whole lie in `places` under the base's names, its factors under their own.
    """
    root = files.resolve(path)
    names = files.list_folder(root)
    for whole in (SINGLE, INDEX):
        if whole in names:
            raise CheckpointError(path, f"has both {ADAPTER_CONFIG} and {whole}", "remove the one that is not meant")
    config_file, weights = contained(root, ADAPTER_CONFIG), _weights(root, names, allow_pickle)
    prints = {file: files.fingerprint(file) for file in (weights, config_file)}
    settings = _settings(read_config(root / ADAPTER_CONFIG), root / ADAPTER_CONFIG)
    read = read_pickle if weights.name == _PICKLED_MODEL else read_header
    parts = _parts(read(weights), settings, weights)
    updates = {f"{module}.weight": _update(module, found, settings, weights) for module, found in parts.layers.items()}
    for name in updates.keys() & parts.whole.keys():
        if name not in parts.beginnings:
            raise CheckpointError(weights, f"has tensor {name!r} both whole and as factors", "keep one of the two")
        updates[name] = replace(updates[name], replaces_base=True)
    places = {info.spec.name: info for found in parts.layers.values() for info in found.values()} | parts.whole
    tensors = {name: TensorSpec(name, u.B.dtype, u.shape) for name, u in updates.items()}
    tensors |= {name: info.spec for name, info in parts.whole.items()}
    adapter = Adapter(updates, len(parts.whole.keys() - updates.keys()))
    return Checkpoint(path, tensors, {}, (), places, prints, adapter)


def with_adapter(model: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """A model with an adapter's updates of its tensors, to be applied as they are read."""
    if adapter.adapter is None or model.adapter is not None:
        path, what = (adapter.path, "is no adapter") if adapter.adapter is None else (model.path, "is an adapter")
        raise CheckpointError(path, what, "write MODEL+ADAPTER")
    updates = {
        name: replace(update, replaces_base=name in model.tensors) for name, update in adapter.adapter.updates.items()
    }
    whole = {name: spec for name, spec in adapter.tensors.items() if name not in updates}
    return replace(
        model,
        tensors={**{name: adapter.tensors[name] for name in updates}, **model.tensors, **whole},
        places={**model.places, **adapter.places},
        fingerprints={**model.fingerprints, **adapter.fingerprints},
        adapter=replace(adapter.adapter, updates=updates, on_a_model=True),
    )


def _weights(root: Path, names: list[str], allow_pickle: bool) -> Path:
    if ADAPTER_MODEL in names:
        return contained(root, ADAPTER_MODEL)
    if _PICKLED_MODEL not in names:
        raise CheckpointError(root, f"has {ADAPTER_CONFIG} but no {ADAPTER_MODEL}", "fetch the adapter's weights too")
    if not allow_pickle:
        raise CheckpointError(root, "has only pickled weights, which can run code", CONVERT)
    return contained(root, _PICKLED_MODEL)


# --- the configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """Rank and alpha, with the patterns that give some modules their own."""

    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    biases: bool

    def scaling(self, module: str) -> tuple[int, float]:
        """The rank of a module and its factor: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA."""
        rank = int(_matching(self.ranks, module, self.rank))
        alpha = _matching(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _settings(config: Mapping[str, Any], path: Path) -> _Settings:
    if config.get("peft_type") != "LORA":
        what = f"peft_type is {str(config.get('peft_type'))[:40]!r}, and only LORA can be read"
        raise CheckpointError(path, what, _MERGE_FIRST)
    for key, value in config.items():
        if key not in _HARMLESS and key not in _READ and value not in (None, False, [], {}):
            cure = f"{_MERGE_FIRST}, or remove the key if it does not change the weights"
            raise CheckpointError(path, f"{key[:80]!r} is set, which cannot be read", cure)
    beginning = config.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        what = f"init_lora_weights is {str(beginning)[:40]!r}, which may have changed the base's weights"
        raise CheckpointError(path, what, _MERGE_FIRST)
    return _Settings(
        int(_number(config, "r", path, 8, whole=True)),
        _number(config, "lora_alpha", path, 8),
        _patterns(config, "rank_pattern", path, whole=True),
        _patterns(config, "alpha_pattern", path),
        _flag(config, "use_rslora", path),
        _flag(config, "use_dora", path),
        config.get("bias", "none") != "none",
    )


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key) or False
    if value not in (True, False):
        raise CheckpointError(path, f"{key!r} is {str(value)[:40]!r}, not true or false", "mend the file")
    return bool(value)


def _number(
    config: Mapping[str, Any], key: str, path: Path, default: float | None = None, whole: bool = False
) -> float:
    value = config.get(key, default)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not abs(value) < 1 << 30 or (whole and value < 1):
        what = f"{key[:80]!r} is {str(value)[:40]!r}, not a {'rank' if whole else 'number'}"
        raise CheckpointError(path, what, "mend the file")
    return float(value)


def _patterns(config: Mapping[str, Any], key: str, path: Path, whole: bool = False) -> dict[str, float]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise CheckpointError(path, f"{key!r} is no table", "mend the file")
    for pattern in table:
        if not _is_harmless(pattern):
            what = f"{key!r} has the pattern {pattern[:80]!r}, which is none or may take for ever to match"
            raise CheckpointError(path, what, "write the modules' names out")
    return {pattern: _number(table, pattern, path, whole=whole) for pattern in table}


def _is_harmless(pattern: str) -> bool:
    """Whether a pattern from a file is one, and so simple that no name takes long to match."""
    counts = {character: pattern.count(character) for character in "*+{?(|"}
    repeats = counts["*"] + counts["+"] + counts["{"]
    repeated_group = re.search(r"\)[*+{]", pattern)
    if len(pattern) > 1000 or repeats > 2 or counts["?"] > 2 or counts["("] > 4 or counts["|"] > 64 or repeated_group:
        return False
    try:
        re.compile(_whole_end(pattern))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _whole_end(pattern: str) -> str:
    """As PEFT has it: a pattern stands for the end of a module's name, from the beginning of a part of it."""
    return rf"(.*\.)?({pattern})$"


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches, in the order of the file."""
    return next((value for pattern, value in patterns.items() if re.match(_whole_end(pattern), module)), default)


# --- the tensors ---------------------------------------------------------------------------------------------

_Found = dict[str, TensorInfo]  # by part: A, B, embedding_A, embedding_B, magnitude


@dataclass(frozen=True)
class _Parts:
    """The factors by module, and whole tensors by the base's name; `beginnings` of these are weights that an update
    starts from.
    """

    layers: dict[str, _Found]
    whole: dict[str, TensorInfo]
    beginnings: set[str]


def _parts(infos: list[TensorInfo], settings: _Settings, path: Path) -> _Parts:
    parts = _Parts({}, {}, set())
    for info in infos:
        stored = info.spec.name
        if not stored.startswith(PREFIX):
            raise CheckpointError(path, f"tensor {stored!r} does not begin with {PREFIX!r}", "save it with peft")
        name = stored.removeprefix(PREFIX)
        if not info.spec.dtype.is_floating_point:
            raise CheckpointError(path, f"tensor {stored!r} is {info.spec.dtype}", "dequantise the adapter first")
        place = _factor(name)
        if place is not None:
            module, part = place
            _add(parts.layers.setdefault(module, {}), part, info, path)
            continue
        if "lora_" in name or "modules_to_save." in name:
            raise CheckpointError(path, f"tensor {stored!r} is of a kind that cannot be read", _MERGE_FIRST)
        if settings.biases and name.endswith(".bias"):
            raise CheckpointError(path, f"has trained biases, as {stored!r}, which cannot be read", _MERGE_FIRST)
        own = name.replace(".base_layer.", ".")
        if own != name:
            parts.beginnings.add(own)
        _add(parts.whole, own, TensorInfo(replace(info.spec, name=own), info.file, info.offset), path)
    if not parts.layers and not parts.whole:
        raise CheckpointError(path, "holds no tensors", "fetch the adapter again")
    return parts


def _factor(name: str) -> tuple[str, str] | None:
    """The module and the part of it that a tensor is; None where it is no factor."""
    found = _FACTOR.fullmatch(name)
    if found:
        return found["module"], found["side"]
    found = _EMBEDDING_FACTOR.fullmatch(name)
    if found:
        return found["module"], f"embedding_{found['side']}"
    found = _MAGNITUDE.fullmatch(name)
    return (found["module"], "magnitude") if found else None


def _add(table: _Found, key: str, info: TensorInfo, path: Path) -> None:
    if key in table:
        what = f"tensor {info.spec.name!r} is one of two for the same layer"
        raise CheckpointError(path, what, "keep one adapter in the folder")
    table[key] = info


def _update(module: str, found: _Found, settings: _Settings, path: Path) -> Update:
    """The update of one module, its factors checked against each other and the configuration."""
    embedding = "embedding_A" in found
    sides = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    wanted = {*sides, "magnitude"} if settings.dora else {*sides}
    for part in (*sorted(wanted - found.keys()), *sorted(found.keys() - wanted)):
        what = f"module {module!r} {'lacks' if part in wanted else 'has'} the tensor lora_{part}"
        cure = "fetch the adapter again, or mend use_dora in its adapter_config.json"
        raise CheckpointError(path, what, cure)
    A, B = (found[side].spec for side in sides)
    magnitude = found["magnitude"].spec if settings.dora else None
    if len(A.shape) != 2 or len(B.shape) != 2:
        what = f"module {module!r} has factors of shapes {list(A.shape)} and {list(B.shape)}, no matrices"
        raise CheckpointError(path, what, _MERGE_FIRST)
    rank, scaling = settings.scaling(module)
    if not A.shape[0] == B.shape[1] == rank:
        what = f"module {module!r} has factors of shapes {list(A.shape)} and {list(B.shape)}, but its rank is {rank}"
        raise CheckpointError(path, what, "mend r or rank_pattern in adapter_config.json")
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        what = f"tensor {magnitude.name!r} has shape {list(magnitude.shape)}, not {list(B.shape[:1])}"
        raise CheckpointError(path, what, "fetch the adapter again")
    return Update(A, B, scaling, magnitude, transposed=embedding, embedding=embedding)
