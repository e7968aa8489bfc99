"""Models of which some use their embedding as their output head, and some have a head of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from acemerge.checkpoints.folder import Checkpoint
from acemerge.errors import CheckpointError
from acemerge.models.roles import Roles, find_roles

_KEY = "tie_word_embeddings"


def heads_apart(
    models: Sequence[Checkpoint], who: Sequence[str], roles: Roles
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """Models, the base first, with a head apart from the embedding if one of them has it; roles that know; and notes.

    A head of its own is one that is stored beside the embedding where the configuration says that the two are not
    tied. A tied model then has its one matrix in every place, and the base's configuration says that they are not
    tied. Where all models are tied nothing changes. Raises CheckpointError for an adapter that changes what its base
    ties.
    """
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
        names = {joined.identity[name]: name for name in model.tensors}
        if model.adapter is not None and together and owner:
            _check_untouched(who[i], who[owner], [names.get(joined.identity[name]) for name in tied])
        elif alike and (_ties(model.config) or (i == 0 and together and owner)):
            stored = {apart.identity[name] for name in model.tensors}
            for name in tied:
                source = names.get(joined.identity[name])
                if source is not None and apart.identity[name] not in stored:
                    model = _with_copy(model, name, source)
                    notes.append(f"{who[i]}: {name} is {source}, to which it is tied")
        found.append(model)
    if together and owner:
        found[0] = replace(found[0], config=_with_tie(base.config, False))
        notes.append(f"the output's head is apart from its embedding, as that of {who[owner]} is")
    return found, apart, notes


def _check_untouched(where: str, owner: str, changed: Sequence[str | None]) -> None:
    """CheckpointError for an adapter of what is one tensor in its base and two in the output."""
    name = next(filter(None, changed), None)
    if name is not None:
        what = f"changes {name!r}, which its base has tied, and {owner} has not"
        raise CheckpointError(where, what, "merge it into its base with peft first")


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
    """The model with a tensor under another name, too."""
    tensors = {**model.tensors, name: replace(model.tensors[source], name=name)}
    scales = {**model.scales, name: model.scales[source]} if source in model.scales else model.scales
    return replace(model, tensors=tensors, places={**model.places, name: model.places[source]}, scales=scales)
