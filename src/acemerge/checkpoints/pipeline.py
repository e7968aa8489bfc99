"""A diffusers pipeline: `model_index.json`, and a model in each of its folders, as one checkpoint.

The tensors of a component have its folder before their names: `unet/conv_in.weight`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import MODEL_INDEX, component_weights, is_component, is_of_pipeline
from acemerge.checkpoints.config import read_config
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import TensorInfo
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.unfinished import check_finished
from acemerge.checkpoints.weight_files import has_weights, safetensors_in
from acemerge.errors import CheckpointError, fetching


def is_pipeline(path: Path) -> bool:
    """Whether a folder has components and no weights of its own."""
    root = files.resolve(path)
    names = files.list_folder(root) if files.kind(root) == "folder" else []
    return MODEL_INDEX in names and not has_weights(names)


def open_pipeline(path: Path) -> Checkpoint:
    """Open all components that have weights. Raises CheckpointError for those that cannot be read or are not known."""
    root = files.resolve(path)
    read_config(root / MODEL_INDEX)
    there = files.list_folder(root)
    check_finished(path, there)
    folders = [name for name in there if files.kind(contained(root, name)) == "folder"]
    places: dict[str, TensorInfo] = {}
    prints: dict[Path, files.Fingerprint] = {}
    assets = [MODEL_INDEX]
    for folder in folders:
        names = files.list_folder(root / folder)
        weights = component_weights(folder)
        if weights:
            found, infos = safetensors_in(contained(root, folder), weights)
            if not found:
                what = f"its component {folder} has no {weights}"
                raise CheckpointError(path, what, "save it again with save_pretrained, without a variant")
            prints |= found
            for info in infos:
                name = f"{folder}/{info.spec.name}"
                places[name] = replace(info, spec=replace(info.spec, name=name), within=info)
        elif any(name.endswith((".safetensors", ".bin")) for name in names):
            what = f"has weights in {folder}, which is no component that is known here"
            raise CheckpointError(path, what, f"merge what is in {folder} by itself, and name a pipeline without it")
        inside = [f"{folder}/{name}" for name in names] if is_component(folder) else []
        assets += [n for n in inside if is_of_pipeline(n) and n != f"{folder}/{weights}"]
    if not places:
        raise CheckpointError(path, "is a pipeline without any component that has weights", fetching("it again"))
    return Checkpoint(path, {name: i.spec for name, i in places.items()}, {}, tuple(assets), places, prints)
