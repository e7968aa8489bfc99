"""A LoRA adapter in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.adapter import Adapter, StackedFactors, Update
from acemerge.checkpoints.adapter_config import MERGE_FIRST, AdapterSettings, read_adapter_settings
from acemerge.checkpoints.config import read_config
from acemerge.checkpoints.folder import Checkpoint, open_checkpoint
from acemerge.checkpoints.header import TensorInfo, TensorSpec, read_header
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.pickles import read_pickle
from acemerge.checkpoints.pipeline import is_pipeline, open_pipeline
from acemerge.checkpoints.unfinished import check_finished
from acemerge.checkpoints.weight_files import ADAPTER, INDEX, PICKLED_ADAPTER, SINGLE, readable_adapter
from acemerge.errors import CheckpointError, fetching

ADAPTER_CONFIG, ADAPTER_MODEL = ADAPTER
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[\w-]+)?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[\w-]+)?")
_SAVED = re.compile(r"\.modules_to_save\.(?:default\.)?")
_ORIGINAL = ".original_module."
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


_BOTH = "name both, as {model: MODEL, adapter: ADAPTER}, or in a recipe of mergekit as MODEL+ADAPTER"


def open_expert(path: Path, allow_pickle: bool = False, dequantize: bool = False) -> Checkpoint:
    """Open a checkpoint, an adapter or a pipeline: headers and configuration only.

    Raises CheckpointError for what none of them is, and for an adapter that cannot be read in full.
    """
    if is_pipeline(path):
        return open_pipeline(path)
    return open_adapter(path, allow_pickle) if is_adapter(path) else open_checkpoint(path, allow_pickle, dequantize)


def open_adapter(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """An adapter as a checkpoint whose `tensors` are those of the base that it changes.

    The tensors that it holds whole lie in `places` under the base's names, its factors under their own.
    """
    root = files.resolve(path)
    names = files.list_folder(root)
    check_finished(path, names)
    for whole in (SINGLE, INDEX):
        if whole in names:
            raise CheckpointError(path, f"has both {ADAPTER_CONFIG} and {whole}", "remove the one that is not meant")
    stored = readable_adapter(root, names, allow_pickle, fetching("the adapter's weights too"))
    config_file, weights = contained(root, ADAPTER_CONFIG), contained(root, stored)
    prints = {file: files.fingerprint(file) for file in (weights, config_file)}
    settings = read_adapter_settings(read_config(root / ADAPTER_CONFIG), root / ADAPTER_CONFIG)
    read = read_pickle if stored == PICKLED_ADAPTER else read_header  # in the Hub's cache they are links
    parts = _parts(read(weights), settings, weights)
    changed = _changed(parts.layers, settings, weights)
    updates = {changed[m]: _update(changed[m], found, settings, weights) for m, found in parts.layers.items()}
    for name in updates.keys() & parts.whole.keys():
        if name not in parts.beginnings:
            raise CheckpointError(weights, f"has tensor {name!r} both whole and as factors", "keep one of the two")
        updates[name] = replace(updates[name], replaces_base=True)
    places = {info.spec.name: info for found in parts.layers.values() for info in found.values()} | parts.whole
    tensors = {name: TensorSpec(name, u.B.dtype, u.shape) for name, u in updates.items()}
    tensors |= {name: info.spec for name, info in parts.whole.items()}
    saved = frozenset(name for name in parts.whole.keys() - updates.keys() if settings.saves(name))
    adapter = Adapter(updates, len(parts.whole.keys() - updates.keys()), saved=saved)
    return Checkpoint(path, tensors, {}, (), places, prints, adapter)


def with_adapter(model: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """A model with an adapter's updates of its tensors, to be applied as they are read."""
    if adapter.adapter is None or model.adapter is not None:
        path, what = (adapter.path, "is no adapter") if adapter.adapter is None else (model.path, "is an adapter")
        raise CheckpointError(path, what, _BOTH)
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


# --- the tensors ---------------------------------------------------------------------------------------------

_Found = dict[str, TensorInfo]  # by part: A, B, embedding_A, embedding_B, magnitude


@dataclass(frozen=True)
class _Parts:
    """The factors by module, and whole tensors by the base's name; `beginnings` of these are weights that an update
    starts from. Where PEFT wraps a module several times, a parameter each, its name has `.base_layer` so many times.
    """

    layers: dict[str, _Found]
    whole: dict[str, TensorInfo]
    beginnings: set[str]


def _parts(infos: list[TensorInfo], settings: AdapterSettings, path: Path) -> _Parts:
    parts = _Parts({}, {}, set())
    for info in _without_copies(infos):
        stored = info.spec.name
        if not stored.startswith(PREFIX):
            raise CheckpointError(path, f"tensor {stored!r} does not begin with {PREFIX!r}", "save it with peft")
        name = stored.removeprefix(PREFIX)
        if not info.spec.dtype.is_floating_point:
            raise CheckpointError(
                path, f"tensor {stored!r} is {info.spec.dtype}", "save it again in bfloat16 or float32"
            )
        place = _factor(name)
        if place is not None:
            module, part = place
            _add(parts.layers.setdefault(module, {}), part, info, path)
            continue
        if "lora_" in name or _ORIGINAL in name:
            raise CheckpointError(path, f"tensor {stored!r} is of a kind that cannot be read", MERGE_FIRST)
        if settings.biases and name.endswith(".bias"):
            raise CheckpointError(path, f"has trained biases, as {stored!r}, which cannot be read", MERGE_FIRST)
        own = _SAVED.sub(".", name).replace(".base_layer.", ".")
        if own != name:
            parts.beginnings.add(own)
        _add(parts.whole, own, replace(info, spec=replace(info.spec, name=own), within=info), path)
    if not parts.layers and not parts.whole:
        raise CheckpointError(path, "holds no tensors", fetching("the adapter again"))
    return parts


def _without_copies(infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors without those that PEFT writes beside a saved module's own and does not read again."""
    names = {info.spec.name for info in infos}
    saved = {_SAVED.sub(".", name) for name in names if _SAVED.search(name)} | names

    def is_copy(name: str) -> bool:
        own = _SAVED.sub(".", name)
        return own in names - {name} or (_ORIGINAL in name and name.replace(_ORIGINAL, ".") in saved)

    return [info for info in infos if not is_copy(info.spec.name)]


def _changed(modules: Mapping[str, _Found], settings: AdapterSettings, path: Path) -> dict[str, str]:
    """The parameter that each module's factors change, by the module as it is named in the file.

    A module's only one is its weight. Of several the configuration has the names; PEFT wraps the first one first, so
    that it lies deepest, and transformers registers the projections up before those down.
    """
    depths: dict[str, list[str]] = {}
    for module in modules:
        depths.setdefault(module.replace(".base_layer", ""), []).append(module)
    names = {}
    for module, wrapped in depths.items():
        wanted = settings.parameters_of(module) or (("weight",) if len(wrapped) == 1 else ())
        if len(wanted) != len(wrapped):
            what = f"module {module!r} has {len(wrapped)} updates, and target_parameters names {len(wanted)} of them"
            raise CheckpointError(path, what, MERGE_FIRST)
        for i, found in enumerate(sorted(wrapped, key=len, reverse=True)):
            names[found] = f"{module}.{wanted[i]}"
    return names


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


def _update(name: str, found: _Found, settings: AdapterSettings, path: Path) -> Update:
    """The update of one tensor, its factors checked against each other and the configuration."""
    embedding = "embedding_A" in found
    sides = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    wanted = {*sides, "magnitude"} if settings.dora else {*sides}
    module = name.removesuffix(".weight")
    for part in (*sorted(wanted - found.keys()), *sorted(found.keys() - wanted)):
        what = f"module {module!r} {'lacks' if part in wanted else 'has'} the tensor lora_{part}"
        cure = fetching("the adapter again, or mend use_dora in its adapter_config.json")
        raise CheckpointError(path, what, cure)
    A, B = (found[side].spec for side in sides)
    magnitude = found["magnitude"].spec if settings.dora else None
    if len(A.shape) != 2 or len(B.shape) != 2:
        what = f"module {module!r} has factors of shapes {list(A.shape)} and {list(B.shape)}, no matrices"
        raise CheckpointError(path, what, MERGE_FIRST)
    # PEFT's configuration names what it wraps: the module, or the parameter.
    rank, scaling = settings.scaling(name if settings.parameters_of(name.rpartition(".")[0]) else module)
    count = 1 if name.endswith(".weight") else A.shape[0] // rank
    stack = StackedFactors(count) if count > 1 else None
    if not A.shape[0] == B.shape[1] == rank * count:
        what = f"module {module!r} has factors of shapes {list(A.shape)} and {list(B.shape)}, but its rank is {rank}"
        raise CheckpointError(path, what, "mend r or rank_pattern in adapter_config.json")
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        what = f"tensor {magnitude.name!r} has shape {list(magnitude.shape)}, not {list(B.shape[:1])}"
        raise CheckpointError(path, what, fetching("the adapter again"))
    return Update(A, B, scaling, magnitude, transposed=embedding, embedding=embedding, stack=stack)
