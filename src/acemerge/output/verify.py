"""Checks a finished output folder against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files, named
from acemerge.checkpoints.assets import HEADS, in_module, is_component, is_of_pipeline
from acemerge.checkpoints.header import read_header
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.lora import open_expert
from acemerge.checkpoints.weight_files import is_model_file
from acemerge.errors import CheckpointError
from acemerge.output.manifest import load_manifest, stored_names
from acemerge.output.names import OLD, side_folders
from acemerge.output.records import AGAIN
from acemerge.output.writer import PARTIAL
from acemerge.planning.finite import check_finite


def verify(folder: str | Path) -> dict[str, Any]:
    """Check hashes, completeness and finiteness of OUT and return its manifest.

    Raises CheckpointError that names the first file or tensor that is missing, altered or not finite.
    """
    folder = named.location(folder)
    root = files.resolve(folder)
    if files.kind(root) != "folder":
        raise CheckpointError(folder, "no such folder", "name a folder that acemerge wrote")
    manifest = load_manifest(folder)
    outputs = manifest["outputs"]
    for name in _model_files(root):
        if name not in outputs:
            raise CheckpointError(
                folder / name, "is not in the manifest", "remove it, or make the output again with --overwrite"
            )
    for name, expected in outputs.items():
        _check_file(contained(root, name), expected)
    _check_tensors(folder, manifest)
    return manifest


def _model_files(folder: Path) -> list[str]:
    """The files that a reader would take for a part of the model; not those of an unfinished run beside it."""
    extra = [f"{side}/{name}" for side in side_folders(folder) for name in files.list_folder(folder / side)]
    extra = [name for name in extra if not name.endswith((PARTIAL, OLD))]
    extra = [name for name in extra if is_of_pipeline(name) or not is_component(name.split("/")[0])]
    return [name for name in files.list_folder(folder) if is_model_file(name)] + extra


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if files.kind(path) != "file":
        raise CheckpointError(path, "is missing", AGAIN)
    if files.fingerprint(path)[0] != expected["bytes"]:
        raise CheckpointError(path, "has another size than when it was written", AGAIN)
    if files.sha256(path) != expected["sha256"]:
        raise CheckpointError(path, "was altered since it was written", AGAIN)


def _check_tensors(folder: Path, manifest: dict[str, Any]) -> None:
    checkpoint = open_expert(folder)
    stored = stored_names(manifest)
    missing = stored - checkpoint.places.keys()
    if missing:
        raise CheckpointError(folder, f"tensor {min(missing)!r} is missing", AGAIN)
    for name, info in checkpoint.places.items():
        copied = in_module(name)[0] in manifest["outputs"]  # as it is, with another model's assets
        if name not in stored and not copied:
            raise CheckpointError(folder, f"tensor {name!r} is not in the manifest", AGAIN)
        if info.spec.dtype.is_floating_point:
            value = checkpoint.read(name)
            if manifest["tensors"].get(name, {}).get("infinite"):  # a mask
                value = value.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)
            check_finite(value, name, str(folder), AGAIN)
    for label, heads in manifest["heads"].items():
        name = f"{HEADS}/{label}.safetensors"
        if heads and {info.spec.name for info in read_header(contained(files.resolve(folder), name))} != set(heads):
            raise CheckpointError(folder / name, "has other tensors than the manifest says", AGAIN)
