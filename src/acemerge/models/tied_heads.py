"""Models of which some use their embedding as their output head, and some have a head of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import CheckpointError
from acemerge.models.roles import Roles, find_roles

_KEY = "tie_word_embeddings"
_MERGE_FIRST = "merge it into its base with peft first (merge_and_unload) and name that folder"


def heads_apart(
    models: Sequence[Checkpoint], who: Sequence[str], roles: Roles
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """Models, the base first, with a head apart from the embedding if one of them has it; roles that know; and notes.

    A head of its own is one that is stored beside the embedding where the configuration says that the two are not
    tied, or one of the two that an adapter was trained with a copy of. A tied model then has its one matrix in every
    place, and the base's configuration says that they are not tied. Where all models are tied nothing changes. Raises
    CheckpointError for an adapter whose base ties what is not known here.
    """
    models, roles, notes = _with_own_heads(models, who, roles)
    models, roles, more = _with_own_copies(models, who, roles)
    return models, roles, [*notes, *more]


def _with_own_heads(
    models: Sequence[Checkpoint], who: Sequence[str], roles: Roles
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """Heads that models store beside their embedding."""
    owner, head = next(((i, head) for i, m in enumerate(models) if (head := _own_head(m, roles))), (0, ""))
    own, base = models[owner], models[0]
    together = any(roles.identity[n] == roles.identity[head] for n in own.tensors if n != head) if head else False
    if not together and not (head and any(_ties(model.config) for model in models)):
        return models, roles, []
    specs = {name: spec for model in reversed(models) for name, spec in model.tensors.items()}
    joined = roles if together else find_roles(_with_tie(base.config, True), specs)
    apart = find_roles(_with_tie(base.config, False), specs, untied=True) if together else roles
    split = {joined.identity[name] for name in own.tensors if joined.identity[name] != apart.identity[name]}
    tied = [name for name in own.tensors if joined.identity[name] in split]
    found, notes = [], []
    for i, model in enumerate(models):
        alike = model.config.get("architectures") == base.config.get("architectures")
        if model.adapter is not None and not model.adapter.on_a_model:
            found.append(_in_every_place(model, tied, joined, apart)[0] if together and owner else model)
        elif alike and (_ties(model.config) or (i == 0 and together and owner)):
            model, copied = _in_every_place(model, tied, joined, apart)
            notes += [f"{who[i]}: {name} is {source}, to which it is tied" for name, source in copied]
            found.append(model)
        else:
            found.append(model)
    if together and owner:
        found[0] = replace(found[0], config=_with_tie(base.config, False))
        notes.append(f"the output's head is apart from its embedding, as that of {who[owner]} is")
    return found, apart, notes


def _with_own_copies(
    models: Sequence[Checkpoint], who: Sequence[str], roles: Roles
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """What the base ties and an adapter has a trained copy of: every name of it is a tensor of its own.

    As PEFT has it: the copy takes the place of the module that it was made of, and of no other.
    """
    specs = {name: spec for model in reversed(models) for name, spec in model.tensors.items()}
    owners: dict[int, str] = {}
    tied: dict[str, TensorSpec] = {}
    for i, model in enumerate(models):
        for name in sorted(model.adapter.saved) if model.adapter else ():
            names = _names_of(name, specs, roles)
            if len(names) > 1:
                owners.setdefault(i, name)
                tied |= {other: replace(specs[name], name=other) for other in names}
            elif not roles.from_architecture and _may_be_tied(name, models[0], roles):
                what = f"replaces {name!r}, and what its base ties to that is not known: {roles.source}"
                raise CheckpointError(who[i], what, _MERGE_FIRST)
    if not tied:
        return models, roles, []
    for i, name in owners.items():
        adapter = models[i].adapter
        if adapter is not None and adapter.on_a_model:
            raise CheckpointError(who[i], f"its adapter replaces {name!r}, which its model ties", _MERGE_FIRST)
    untied = any(_ties(model.config) is False for model in models)
    tied |= _also_untied(models[0].config, specs, roles)
    joined = find_roles(models[0].config, tied | specs, untied)
    apart = find_roles(models[0].config, tied | specs, untied, apart=tied)
    found, notes = [], []
    for i, model in enumerate(models):
        model, copied = _in_every_place(model, [*tied], joined, apart)
        whole = model.adapter is None or model.adapter.on_a_model
        notes += [f"{who[i]}: {name} is {source}, to which it is tied" for name, source in copied if whole]
        found.append(model)
    found[0] = replace(found[0], config=_with_tie(models[0].config, False))
    first, name = next(iter(owners.items()))
    notes.append(f"the output's head is apart from its embedding: {who[first]} has a copy of {name}")
    return found, apart, notes


def _names_of(name: str, specs: Collection[str], roles: Roles) -> Sequence[str]:
    """All names of the parameter that this is one of: those of modules that are tied, not spellings of one's."""
    identity = roles.identity[name]
    if roles.from_architecture:
        return roles.tied.get(identity, ())
    return [other for other in specs if roles.identity[other] == identity]


def _also_untied(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], roles: Roles) -> dict[str, TensorSpec]:
    """What else is tied only where the configuration says so, as BERT's two names of the head's bias."""
    stored = {roles.identity[name]: spec for name, spec in specs.items()}
    tied = {n: replace(stored[i], name=n) for i, names in roles.tied.items() if i in stored for n in names}
    free = find_roles(_with_tie(config, False), {**tied, **specs}).identity
    groups = [[name for name in names if name in tied] for names in roles.tied.values()]
    return {name: tied[name] for names in groups if len({free[n] for n in names}) > 1 for name in names}


def _may_be_tied(name: str, base: Checkpoint, roles: Roles) -> bool:
    return bool(_ties(base.config)) and roles.by_name[name].name in ("embedding", "output_head")


def _in_every_place(
    model: Checkpoint, names: Sequence[str], joined: Roles, apart: Roles
) -> tuple[Checkpoint, list[tuple[str, str]]]:
    """The model with what it has of a tied tensor under all of its names, and which of them were added from which.

    An adapter that has a trained copy of one of them is left as it is: it changes that one alone.
    """
    of = {joined.identity[name]: name for name in model.tensors}
    stored, saved = {apart.identity[name] for name in model.tensors}, model.adapter.saved if model.adapter else ()
    alone = {joined.identity[name] for name in saved}
    added = []
    for name in names:
        source = of.get(joined.identity[name])
        if source is not None and apart.identity[name] not in stored and joined.identity[name] not in alone:
            model = _with_copy(model, name, source)
            added.append((name, source))
    return model, added


def _own_head(model: Checkpoint, roles: Roles) -> str:
    """The name of a model's own head; empty where it has none."""
    if model.adapter is not None or _ties(model.config) is not False:
        return ""
    kinds = {name: roles.by_name[name].name for name in model.tensors}
    shapes = {model.tensors[name].shape for name, kind in kinds.items() if kind == "embedding"}
    heads = (name for name, kind in kinds.items() if kind == "output_head" and model.tensors[name].shape in shapes)
    return next(heads, "")


def _ties(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says of its head; None where it says nothing."""
    text = config.get("text_config")
    told = config.get(_KEY, text.get(_KEY) if isinstance(text, Mapping) else None)
    return told if isinstance(told, bool) else None


def _with_tie(config: Mapping[str, Any], tie: bool) -> Mapping[str, Any]:
    text = config.get("text_config")
    inner = {"text_config": {**text, _KEY: tie}} if isinstance(text, Mapping) and _KEY in text else {}
    return {**config, _KEY: tie, **inner}


def _with_copy(model: Checkpoint, name: str, source: str) -> Checkpoint:
    """The model with a tensor, or an adapter's update of one, under another name, too."""
    tensors = {**model.tensors, name: replace(model.tensors[source], name=name)}
    scales = {**model.scales, name: model.scales[source]} if source in model.scales else model.scales
    adapter, places = model.adapter, model.places
    if source in places:
        places = {**places, name: places[source]}
    if adapter is not None and source in adapter.updates:
        adapter = replace(adapter, updates={**adapter.updates, name: adapter.updates[source]})
    return replace(model, tensors=tensors, places=places, scales=scales, adapter=adapter)
