"""Whether an adapter fits a base: which tensor each of its updates goes to, and which way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from acemerge.checkpoints.adapter import Update
from acemerge.errors import CheckpointError
from acemerge.models.roles import Roles
from acemerge.planning.jobs import ModelHeader

_OTHER_BASE = "name the base that the adapter was trained on"
_BOTH = "set tie_word_embeddings to false in the base's config.json and store both tensors, or merge the adapter first"


@dataclass(frozen=True)
class Fitted:
    """An adapter's updates by the identity of the base's tensor, and what is to be said of them."""

    updates: Mapping[str, Update] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def fit(
    expert: ModelHeader, label: str, base: ModelHeader, base_names: Mapping[str, Sequence[str]], roles: Roles
) -> Fitted:
    """The updates of one expert, none of one that is no adapter; `base_names` are the base's by identity.

    Raises CheckpointError, naming the tensor, for an update of a tensor that the base lacks or that has another shape,
    and for two of one tensor.
    """
    if expert.adapter is None:
        return Fitted()
    where, updates, warnings = f"expert {label}", {}, []
    for name, update in expert.adapter.updates.items():
        identity = roles.identity[name]
        if identity not in base_names:
            raise CheckpointError(where, f"changes tensor {name!r}, which the base lacks", _OTHER_BASE)
        if identity in updates:
            raise CheckpointError(
                where, f"changes both spellings of the tied tensor {base_names[identity][0]!r}", _BOTH
            )
        stored = base_names[identity][0]
        updates[identity] = _turned(update, name, stored, where, base, roles)
        if _is_tied(name, stored, roles):
            warnings.append(f"{where}: its update of {name} goes to {stored}, too, to which it is tied")
    _check_whole(expert, where, base_names, updates, roles)
    if not updates and not any(roles.identity[name] in base_names for name in expert.tensors):
        raise CheckpointError(where, "changes no tensor of the base", _OTHER_BASE)
    return Fitted(updates, warnings)


def _turned(update: Update, name: str, stored: str, where: str, base: ModelHeader, roles: Roles) -> Update:
    """The update, the way round that the base stores the tensor."""
    turned = replace(update, transposed=update.embedding or roles.by_name[stored].transposed)
    if turned.shape != base.tensors[stored].shape:
        shapes = f"{list(turned.shape)}, but {list(base.tensors[stored].shape)} in the base"
        raise CheckpointError(where, f"its update of tensor {name!r} has shape {shapes}", _OTHER_BASE)
    return turned


def _check_whole(
    expert: ModelHeader,
    where: str,
    base_names: Mapping[str, Sequence[str]],
    updates: Mapping[str, Update],
    roles: Roles,
) -> None:
    """A tied tensor that the adapter replaces under one of its names only is tied no more."""
    assert expert.adapter is not None
    whole = [name for name in expert.tensors if name not in expert.adapter.updates]
    replaced = {roles.identity[name]: name for name in whole if roles.identity[name] in base_names}
    for identity, name in replaced.items():
        stored = base_names[identity][0]
        # Where it replaces the other spelling too, both are read and must agree.
        alone = sum(roles.identity[other] == identity for other in whole) == 1
        if identity in updates or (alone and _is_tied(name, stored, roles)):
            raise CheckpointError(where, f"replaces {name!r}, which is tied to {stored!r}", _BOTH)


def _is_tied(name: str, stored: str, roles: Roles) -> bool:
    """Whether two names of one parameter are an embedding and a head, not two spellings of either."""
    kinds = {roles.by_name[name].name, roles.by_name[stored].name}
    return kinds == {"embedding", "output_head"}
