"""Names that a wrapper put a prefix before, as `module.` of data-parallel training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from acemerge.checkpoints.folder import Checkpoint

_WRAPPERS = ("module.", "_orig_mod.", "base_model.", "model.")


def without_wrapper(expert: Checkpoint, base_names: Collection[str]) -> tuple[Checkpoint, str]:
    """The expert under names that the base knows, and the prefix that was taken off all of them.

    Wrappers may lie within each other, as `module._orig_mod.`. A prefix goes only where every name has it and the
    base then knows more of them. An adapter's names were taken out of its wrapper already.
    """
    if expert.adapter is not None:
        return expert, ""
    prefix, best, known = "", "", _known(expert, "", base_names)
    while True:
        more = next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in expert.tensors)), "")
        if not more or not expert.tensors:
            break
        prefix += more
        found = _known(expert, prefix, base_names)
        if found > known:
            best, known = prefix, found
    if not best:
        return expert, ""
    cut = len(best)
    tensors = {name[cut:]: replace(spec, name=name[cut:]) for name, spec in expert.tensors.items()}
    places = {name[cut:]: info for name, info in expert.places.items()}
    scales = {name[cut:]: scale for name, scale in expert.scales.items()}
    return replace(expert, tensors=tensors, places=places, scales=scales), best


def _known(expert: Checkpoint, prefix: str, base_names: Collection[str]) -> int:
    return sum(name[len(prefix) :] in base_names for name in expert.tensors)
