"""What a run is, so that only the same run is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint
from acemerge.recipe import Recipe
from acemerge.report.manifest import versions


def identity(recipe: Recipe, checkpoints: Sequence[Checkpoint], max_shard: int, device: str) -> dict[str, Any]:
    """All that decides the bytes of the output, as JSON has it.

    Inputs are known by the size and times of their files: their hashes are only there when all was read. The
    number of threads counts, because a product's rounding may depend on it.
    """
    inputs = {str(checkpoint.path): _prints(checkpoint) for checkpoint in checkpoints}
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "input": inputs,
        "largest shard": max_shard,
        "device": device,
        "threads": torch.get_num_threads(),
        "version": {name: value for name, value in versions().items() if name in ("acemerge", "torch")},
    }
    found: dict[str, Any] = json.loads(json.dumps(about))
    return found


def _prints(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    weights = {path.name: prints for path, prints in checkpoint.fingerprints.items()}
    return weights | {name: files.fingerprint(checkpoint.path / name) for name in checkpoint.assets}


def digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def difference(before: Any, now: Any, place: str = "") -> str | None:
    """Where two identities first differ, and how, in words."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(before.keys() - now.keys())]:
            found = difference(before.get(key), now.get(key), f"{place} {key}".strip())
            if found:
                return found
    if place.startswith("input"):
        return f"{place} was written to" if before and now else f"{place} was {'removed' if before else 'added'}"
    return f"{place} was {json.dumps(before)} and is {json.dumps(now)}"
