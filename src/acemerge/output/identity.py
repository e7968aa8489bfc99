"""What a run is, so that only the same run is continued."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acemerge.checkpoints import files, machine
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.hashes import Read
from acemerge.linalg.device import accelerator, device_name
from acemerge.output.manifest import versions
from acemerge.recipes.recipe import Recipe

# What has a library take other paths through its code than the processor alone would.
_SWITCHES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")


def identity(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], origins: Sequence[str], max_shard: int, device: str
) -> dict[str, Any]:
    """All that decides the bytes of the output, as JSON has it.

    Models are named by their origins: those of the Hub by their commit, whatever their branch holds since. Weights are
    known by the size and times of their files: their hashes are only there when all was read. The number of threads and
    the processor count, because a product's rounding may depend on them.
    """
    inputs = {origin: _prints(checkpoint) for origin, checkpoint in zip(origins, checkpoints, strict=True)}
    about = {
        "recipe": _pinned(recipe, origins),
        "input": inputs,
        "largest shard": max_shard,
        **_device(device),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
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


def _device(name: str) -> dict[str, str]:
    """Which one was asked for, and of an accelerator what it is: each kind rounds in its own way."""
    if name == "auto":
        name = accelerator() or "cpu"
    return {"device": name} if name == "cpu" else {"device": name, "accelerator": device_name(torch.device(name))}


def _processor() -> dict[str, Any]:
    """What decides which of its own paths a library takes for a product."""
    switches = {name: os.environ[name] for name in _SWITCHES if name in os.environ}
    model = machine.processor() or f"{platform.machine()} {platform.processor()}".strip()
    return {"model": model, "capability": torch.backends.cpu.get_cpu_capability(), "switches": switches}


def _prints(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of weights size and times, of the rest the content itself."""
    weights = {path.name: prints for path, prints in checkpoint.fingerprints.items()}
    return weights | {name: files.sha256(checkpoint.path / name) for name in checkpoint.assets}


def with_same_bytes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    models: Sequence[tuple[str, Checkpoint]],
    read: Read,
) -> Mapping[str, Any]:
    """The identity `before`, with a weight file as it is `now` where its times alone differ and what was `read` of it
    is what it still begins with: it was copied, touched, or changed and put back.
    """
    same = copy.deepcopy(dict(before))
    for origin, checkpoint in models:
        known, there = same.get("input", {}).get(origin, {}), now["input"][origin]
        for path in checkpoint.fingerprints:
            was, is_ = known.get(path.name), there[path.name]
            used = read.get(str(path))
            if was and was != is_ and was[0] == is_[0] and used and all(part.holds(path) for part in used.values()):
                known[path.name] = is_
    return same


def digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def difference(before: Any, now: Any, place: str = "", verbs: tuple[str, str] = ("was", "and is")) -> str | None:
    """Where two identities first differ, and how, in words; `verbs` say what the two values are."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(before.keys() - now.keys())]:
            found = difference(before.get(key), now.get(key), f"{place} {key}".strip(), verbs)
            if found:
                return found
    if place.startswith("input"):
        return f"{place} was written to" if before and now else f"{place} was {'removed' if before else 'added'}"
    return f"{place} {verbs[0]} {json.dumps(before)} {verbs[1]} {json.dumps(now)}"
