"""Checks a finished output folder against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.header import read_header
from acemerge.checkpoints.writer import HEADS
from acemerge.compute import check_finite
from acemerge.errors import CheckpointError
from acemerge.report.manifest import load_manifest

_CURE = "merge again, or restore the file"


def verify(folder: str | Path) -> dict[str, Any]:
    """Check hashes, completeness and finiteness of OUT and return its manifest.

    Raises CheckpointError that names the first file or tensor that is missing, altered or not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder", "name a folder that acemerge wrote")
    manifest = load_manifest(folder)
    for name, expected in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(path, "is missing", _CURE)
        if files.fingerprint(path)[0] != expected["bytes"]:
            raise CheckpointError(path, "has another size than when it was written", _CURE)
        if files.sha256(path) != expected["sha256"]:
            raise CheckpointError(path, "was altered since it was written", _CURE)
    _check_tensors(folder, manifest)
    return manifest


def _check_tensors(folder: Path, manifest: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(folder)
    for name in manifest["tensors"]:
        if name not in checkpoint.tensors:
            raise CheckpointError(folder, f"tensor {name!r} is missing", _CURE)
    for name, spec in checkpoint.tensors.items():
        if name not in manifest["tensors"]:
            raise CheckpointError(folder, f"tensor {name!r} is not in the manifest", _CURE)
        if spec.dtype.is_floating_point:
            check_finite(checkpoint.read(name), name, str(folder))
    for label, heads in manifest["heads"].items():
        if heads:
            path = folder / HEADS / f"{label}.safetensors"
            if {info.spec.name for info in read_header(path)} != set(heads):
                raise CheckpointError(path, "has other tensors than the manifest says", _CURE)
