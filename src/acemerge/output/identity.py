"""What a run is, so that only the same run is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint
from acemerge.output.manifest import versions
from acemerge.recipes.recipe import Recipe


def identity(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], origins: Sequence[str], max_shard: int, device: str
) -> dict[str, Any]:
    """All that decides the bytes of the output, as JSON has it.

    Models are named by their origins: those of the Hub by their commit, whatever their branch holds since. Inputs are
    known by the size and times of their files: their hashes are only there when all was read. The number of threads
    counts, because a product's rounding may depend on it.
    """
    inputs = {origin: _prints(checkpoint) for origin, checkpoint in zip(origins, checkpoints, strict=True)}
    about = {
        "recipe": _pinned(recipe, origins),
        "input": inputs,
        "largest shard": max_shard,
        "device": device,
        "threads": torch.get_num_threads(),
        "version": {name: value for name, value in versions().items() if name in ("acemerge", "torch")},
    }
    found: dict[str, Any] = json.loads(json.dumps(about))
    return found


def _pinned(recipe: Recipe, origins: Sequence[str]) -> dict[str, Any]:
    experts = [
        {**expert.model_dump(mode="json"), "model": origin}
        for expert, origin in zip(recipe.experts, origins[1:], strict=False)
    ]
    for i, origin in zip(recipe.adapters, origins[1 + len(experts) :], strict=True):
        experts[i - 1]["adapter"] = origin
    return {**recipe.model_dump(mode="json"), "base": origins[0], "experts": experts}


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
