"""Whether an adapter fits a base: which tensor each of its updates goes to, and which way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from acemerge.checkpoints.adapter import Adapter, StackedFactors, Update
from acemerge.errors import CheckpointError
from acemerge.models.fused_experts import ExpertPart
from acemerge.models.roles import Roles
from acemerge.planning.jobs import ModelHeader

_OTHER_BASE = "name the base that the adapter was trained on"
_MERGE_FIRST = "merge it into its base with peft (merge_and_unload) and name that folder"


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
    try:
        return _fitted(expert, expert.adapter, f"expert {label}", base, base_names, roles)
    except _MisfitError as failure:  # what was trained on a model of its own need not fit the base
        cure = _MERGE_FIRST if expert.adapter.on_a_model else _OTHER_BASE
        raise CheckpointError(f"expert {label}", str(failure), cure) from None


class _MisfitError(Exception):
    """An adapter changes what the base does not have so."""


def _fitted(
    expert: ModelHeader,
    adapter: Adapter,
    where: str,
    base: ModelHeader,
    base_names: Mapping[str, Sequence[str]],
    roles: Roles,
) -> Fitted:
    warnings = []
    updates: dict[str, Update] = {}
    apart = _experts_apart(base_names, roles)
    for name, update in adapter.updates.items():
        identity = roles.identity[name]
        if update.stack and identity in apart and identity not in base_names:
            updates |= _by_expert(update, update.stack, name, apart[identity], base, base_names)
            continue
        if identity not in base_names:
            raise _MisfitError(f"changes tensor {name!r}, which the base lacks")
        if identity in updates:
            what = f"changes both spellings of the tied tensor {base_names[identity][0]!r}"
            raise CheckpointError(where, what, _MERGE_FIRST)
        stored = base_names[identity][0]
        updates[identity] = _turned(update, name, stored, base, roles)
        if _is_tied(name, stored, roles):
            warnings.append(f"{where}: its update of {name} goes to {stored}, too, to which it is tied")
    whole = [name for name in expert.tensors if name not in adapter.updates]
    _check_whole(whole, where, base_names, updates, roles)
    if not updates and not any(roles.identity[name] in base_names for name in expert.tensors):
        raise _MisfitError("changes no tensor of the base")
    return Fitted(updates, warnings)


def _experts_apart(base_names: Mapping[str, Sequence[str]], roles: Roles) -> dict[str, dict[str, ExpertPart]]:
    """The base's tensors that are parts of a parameter which is fused in memory, by that and their identity."""
    found: dict[str, dict[str, ExpertPart]] = {}
    for identity, names in base_names.items():
        if part := roles.expert_parts.get(names[0]):
            found.setdefault(part.parameter, {})[identity] = part
    return found


def _by_expert(
    update: Update,
    stack: StackedFactors,
    name: str,
    apart: Mapping[str, ExpertPart],
    base: ModelHeader,
    base_names: Mapping[str, Sequence[str]],
) -> dict[str, Update]:
    """The update of a fused parameter for each of the matrices that the base stores in its place."""
    count, found = stack.count, {}
    for identity, part in apart.items():
        own = replace(update, stack=StackedFactors(count, part.number, part.part, part.parts))
        stored = base.tensors[base_names[identity][0]]
        if own.shape != stored.shape or part.number >= count:
            what = f"its update of tensor {name!r} has {count} experts of shape {list(own.shape)}"
            raise _MisfitError(f"{what}, but {stored.name!r} is {list(stored.shape)}")
        found[identity] = own
    if len(found) != count * next(iter(apart.values())).parts:
        what = f"its update of tensor {name!r} is of {count} experts, and the base has {len(found)} matrices of them"
        raise _MisfitError(what)
    return found


def _turned(update: Update, name: str, stored: str, base: ModelHeader, roles: Roles) -> Update:
    """The update, the way round that the base stores the tensor."""
    transposed = update.embedding or roles.by_name[stored].transposed
    if update.stack:  # as PEFT has it, by what the module says; else the matrices are taken as (out, in)
        transposed = roles.identity[stored] in roles.stored_in_out
    turned = replace(update, transposed=transposed)
    if turned.shape != base.tensors[stored].shape:
        shapes = f"{list(turned.shape)}, but {list(base.tensors[stored].shape)} in the base"
        raise _MisfitError(f"its update of tensor {name!r} has shape {shapes}")
    return turned


def _check_whole(
    whole: Sequence[str],
    where: str,
    base_names: Mapping[str, Sequence[str]],
    updates: Mapping[str, Update],
    roles: Roles,
) -> None:
    """Of the tensors `whole` that an adapter replaces, a tied one may not be replaced under one of its names only."""
    replaced = {roles.identity[name]: name for name in whole if roles.identity[name] in base_names}
    for identity, name in replaced.items():
        stored = base_names[identity][0]
        # Where it replaces the other spelling too, both are read and must agree.
        alone = sum(roles.identity[other] == identity for other in whole) == 1
        if identity in updates or (alone and _is_tied(name, stored, roles)):
            raise CheckpointError(where, f"replaces {name!r}, which is tied to {stored!r}", _MERGE_FIRST)


def _is_tied(name: str, stored: str, roles: Roles) -> bool:
    """Whether two names of one parameter are an embedding and a head, not two spellings of either."""
    kinds = {roles.by_name[name].name, roles.by_name[stored].name}
    return kinds == {"embedding", "output_head"}
