"""The names of what a merge leaves in its output, and which of what is there is ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import HEADS, MODEL_INDEX, is_asset_folder, is_component, is_of_pipeline
from acemerge.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_MODEL
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.checkpoints.weight_files import is_model_file
from acemerge.output.writer import PARTIAL

CARD = "README.md"
PICTURE = "merge.svg"  # of the card
REPORT = "report.html"  # made of a finished output, no part of it
MASKS = "masks"
MAX_MANIFEST = 512 << 20
LOCK = ".acemerge.lock"
WORK = ".acemerge.work"  # what a run keeps for itself until it is finished
OLD = ".acemerge.old"


def side_folders(path: Path, kind: files.Kind = "folder") -> list[str]:
    """What is in an output folder under the name of a folder that acemerge writes to, and is of this kind."""
    names = files.list_folder(path) if files.kind(path) == "folder" else []
    ours = [name for name in names if name in (HEADS, MASKS) or is_asset_folder(name)]
    ours += [name for name in names if is_component(name) and (kind == "link" or _is_ours(path, name, names))]
    return [name for name in ours if files.kind(path / name) == kind]


def _is_ours(path: Path, component: str, names: Sequence[str]) -> bool:
    """Whether the folder of a component belongs to a pipeline, or holds what was begun of one."""
    if files.kind(path / component) != "folder":
        return False
    whole = any(name in names for name in (MODEL_INDEX, MODEL_INDEX + PARTIAL, MODEL_INDEX + OLD))
    return whole or any(name.endswith(PARTIAL) for name in files.list_folder(path / component))


def is_output(name: str) -> bool:
    """Whether acemerge writes files of this name."""
    if name.startswith((f"{HEADS}/", f"{MASKS}/")):
        return name.endswith(".safetensors")
    return (
        name in (MANIFEST, CARD, PICTURE, REPORT, ADAPTER_CONFIG, ADAPTER_MODEL)
        or is_model_file(name)
        or is_of_pipeline(name)
    )
