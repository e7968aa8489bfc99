"""Experts that are a part of their base by itself, as the language model of one that also sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from acemerge.checkpoints.folder import Checkpoint
from acemerge.models.roles import Roles


def as_part(expert: Checkpoint, label: str, base: Checkpoint, roles: Roles) -> tuple[Checkpoint, str]:
    """The expert under the base's names, and what is to be said of it, if its configuration is that of a part.

    The rest of the base is then `absent` from it: tensors that it is not asked for and has no say in. It has to have
    all of its part, with the output head if that reads from the part's own embedding. Any other expert, and one that
    has something of the rest, is left as it is.
    """
    prefix = _prefix(expert, base, roles)
    if not prefix:
        return expert, ""
    stored = roles.group(base.tensors)
    renamed = {name: stored[found][0] for name in expert.tensors if (found := _in_base(name, prefix, stored, roles))}
    own = {identity for identity in stored if identity.startswith(prefix)}
    own |= _heads(own, stored, base, roles)
    if not {roles.identity[name] for name in renamed.values()} <= own:
        return expert, ""
    absent = frozenset(stored.keys() - own)
    tensors = {renamed.get(n, n): replace(spec, name=renamed.get(n, n)) for n, spec in expert.tensors.items()}
    places = {renamed.get(name, name): info for name, info in expert.places.items()}
    scales = {renamed.get(name, name): scale for name, scale in expert.scales.items()}
    note = f"expert {label}: is the base's {prefix[:-1]} alone; {len(absent):,} tensors are merged without it"
    return replace(expert, tensors=tensors, places=places, scales=scales, absent=absent), note


def _prefix(expert: Checkpoint, base: Checkpoint, roles: Roles) -> str:
    """Where in the base the part lies that an expert's configuration describes; empty where it is none."""
    kind = expert.config.get("model_type")
    if expert.adapter is not None or not isinstance(kind, str) or kind == base.config.get("model_type"):
        return ""
    # A language model may be named after the one that it was: `qwen2_vl_text` after `qwen2`.
    of_text = [part for part in roles.parts if part.startswith(f"{kind}_") and part.endswith("_text")]
    return next((roles.parts[part] for part in (kind, *of_text) if part in roles.parts), "")


def _in_base(name: str, prefix: str, stored: Mapping[str, Sequence[str]], roles: Roles) -> str:
    """The identity of the base's tensor that an expert's name stands for; empty where there is none."""
    beginnings = (prefix + name, prefix + name.partition(".")[2], roles.identity[name])
    return next((identity for identity in beginnings if identity in stored), "")


def _heads(own: set[str], stored: Mapping[str, Sequence[str]], base: Checkpoint, roles: Roles) -> set[str]:
    """The output heads over the vocabulary of a part's embedding."""
    spec = {identity: base.tensors[names[0]] for identity, names in stored.items()}
    kind = {identity: roles.by_name[names[0]].name for identity, names in stored.items()}
    shapes = {spec[identity].shape for identity in own if kind[identity] == "embedding"}
    return {identity for identity in stored if kind[identity] == "output_head" and spec[identity].shape in shapes}
