"""What each tensor is: asked of the architecture where transformers knows it, else told by name and shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from torch import nn

from acemerge.checkpoints.cache import keep, recall
from acemerge.checkpoints.header import TensorSpec
from acemerge.models.architecture import meta_model, submodels_of
from acemerge.models.fused_experts import ExpertPart, expert_parts, stored_in_out
from acemerge.models.known_roles import key_of
from acemerge.models.lora_targets import Target, lora_targets
from acemerge.models.renaming import checkpoint_renaming

RoleName = Literal["linear", "conv1d", "experts", "embedding", "output_head", "convolution", "norm", "bias", "other"]
LAYERS: tuple[RoleName, ...] = ("linear", "conv1d", "experts")  # weights of linear layers, and stacks of such


@dataclass(frozen=True)
class Role:
    """`transposed` weights are stored (in, out); `origin` says who told. `groups`: of a convolution, whose first
    dimension they divide; names and shapes do not tell them.
    """

    name: RoleName
    transposed: bool = False
    origin: Literal["architecture", "name"] = "architecture"
    groups: int = 1


@dataclass(frozen=True)
class Roles:
    """The role of every tensor name, and which names mean the same tensor.

    `identity` sends a name to that of the parameter it stands for: the two spellings of a tied head, `h.0.x` and
    `transformer.h.0.x` of one architecture, `LayerNorm.gamma` and `LayerNorm.weight` have one identity. `parts` are
    the models of other types within this one: the beginning of their parameters' names, by their types. `tied` are all
    names of each parameter that has several, by their identity. `expert_parts` says of which parameter, fused in
    memory, an expert's matrix is a part; `stored_in_out` are the fused ones whose modules say (expert, in, out).
    `lora_targets` are the weights that PEFT can put a LoRA on.
    """

    by_name: Mapping[str, Role]
    identity: Mapping[str, str]
    source: str
    from_architecture: bool
    parts: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expert_parts: Mapping[str, ExpertPart] = field(default_factory=dict)
    stored_in_out: frozenset[str] = frozenset()
    lora_targets: Mapping[str, Target] = field(default_factory=dict)

    def group(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names of each tensor by its identity, the one that loaders look for first."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.identity[name], []).append(name)
        return {identity: sorted(found, key=lambda name: name != identity) for identity, found in groups.items()}


def find_roles(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], untied: bool = False, apart: Collection[str] = ()
) -> Roles:
    """Roles from the model that `config` describes, built without memory on the meta device.

    Tensors that the architecture does not name, and all of them where it cannot be built, are told by name
    and shape; `Roles.source` says so. `untied`: output heads are tensors of their own, whatever ties them, as are
    parameters of the names `apart`.
    """
    key = key_of(config, tensors, untied, apart)
    known = _recalled(key) if key else None
    if known is not None:
        return known
    model, why_not = meta_model(config, len(tensors))
    if model is None:
        config = {**config, "tie_word_embeddings": False} if untied else config
        return roles_by_name(tensors, config, f"names and shapes ({why_not})")
    found = roles_from_model(model, tensors, f"the architecture {type(model).__name__}", untied, apart)
    if key:
        keep("roles", key, _roles_as_json().dump_json(found))
    return found


def _recalled(key: str) -> Roles | None:
    kept = recall("roles", key)
    try:
        return None if kept is None else _roles_as_json().validate_json(kept)
    except ValidationError:
        return None


@functools.cache
def _roles_as_json() -> TypeAdapter[Roles]:
    return TypeAdapter(Roles)


def roles_from_model(
    model: nn.Module,
    tensors: Mapping[str, TensorSpec],
    source: str,
    untied: bool = False,
    apart: Collection[str] = (),
) -> Roles:
    """Roles from the modules of `model`, whose checkpoint names may differ from its parameter names."""
    in_model = _roles_of_parameters(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    conv1d = any(role.name == "conv1d" for role in in_model.values())
    rename, tied = checkpoint_renaming(model), _tied_spellings(model)
    by_name, identity = {}, {}
    for name in sorted(tensors):
        parameter, pattern = rename(name)
        role = _fit_to_shape(in_model.get(parameter), tensors[name].shape, shapes.get(parameter, ()))
        by_name[name] = role or role_by_name(tensors[name], conv1d)
        alone = parameter in apart or (untied and by_name[name].name == "output_head")
        identity[name] = name if pattern else parameter if alone else tied.get(parameter, parameter)
    heads = [name for name, role in in_model.items() if untied and role.name == "output_head"]
    return Roles(
        by_name,
        identity,
        source,
        from_architecture=True,
        parts=submodels_of(model),
        tied=_by_identity(tied, {*apart, *heads}),
        expert_parts=expert_parts(model, tensors),
        stored_in_out=stored_in_out(model),
        lora_targets=lora_targets(model),
    )


def _by_identity(tied: Mapping[str, str], apart: Collection[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for name, first in tied.items():
        if name not in apart:
            groups[first] = (*groups.get(first, ()), name)
    return {first: names for first, names in groups.items() if len(names) > 1}


def _fit_to_shape(role: Role | None, stored: tuple[int, ...], built: tuple[int, ...]) -> Role | None:
    """The architecture's role where it can hold for a tensor stored in another shape than the parameter's."""
    if role is None or role.name not in LAYERS:
        return role
    if len(stored) == 2:  # with fused experts in memory: one expert's matrix, apart on disk
        return Role("linear") if role.name == "experts" else role
    if len(stored) != 3 or role.name != "experts":
        return None
    if stored != built and stored[1:] == built[:0:-1]:
        return Role("experts", transposed=not role.transposed)
    return role


def _roles_of_parameters(model: nn.Module) -> dict[str, Role]:
    get_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    roles = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            roles[dot + name] = _role_of_parameter(module, name, parameter.ndim, module is head)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # those are no part of a checkpoint
                is_bias = name.endswith("bias") and buffer.ndim <= 2
                roles[dot + name] = Role("norm" if _is_norm(module) else "bias" if is_bias else "other")
    return roles


def _role_of_parameter(module: nn.Module, name: str, ndim: int, is_output_head: bool) -> Role:
    if name.endswith("bias"):
        return Role("bias")
    if isinstance(module, nn.Embedding):
        return Role("embedding")
    if _is_norm(module):
        return Role("norm")
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role("convolution", transposed=module.transposed, groups=module.groups)
    if is_output_head:
        return Role("output_head")
    if type(module).__name__ == "Conv1D":
        return Role("conv1d", transposed=True)
    if ndim == 3 and "expert" in type(module).__name__.lower():
        return Role("experts", transposed=_stores_in_out(module))
    if ndim == 2 and (isinstance(module, nn.Linear) or name.endswith("weight")):
        return Role("linear")
    return Role("embedding" if ndim == 2 and "embed" in name else "other")


def _stores_in_out(module: nn.Module) -> bool:
    """Whether fused experts are (expert, in, out)."""
    told = _shapes_in_out([tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 3])
    return bool(getattr(module, "is_transposed", False)) if told is None else told


def _shapes_in_out(shapes: Sequence[tuple[int, ...]]) -> bool | None:
    """Whether an up and a down projection are (expert, in, out): the first's input is as wide as the second's output.

    None where the shapes do not tell.
    """
    if len(shapes) != 2:
        return None
    (_, a, b), (_, c, d) = shapes
    return a == d if (a == d) != (b == c) else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _tied_spellings(model: nn.Module) -> dict[str, str]:
    """Parameter name -> first name of the parameter, which differs where it is shared."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


# --- by name and shape --------------------------------------------------------------------------------------

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|shared|relative_attention_bias)\.weight$")
_OUTPUT_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|lm_head\.decoder)\.weight$")
_NORM = re.compile(r"(norm|(^|[._])ln)\w*\.(weight|gamma|beta|running_mean|running_var)$", re.IGNORECASE)
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)\.weight$")


def roles_by_name(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], source: str = "names and shapes"
) -> Roles:
    conv1d = _stores_conv1d(tensors)
    by_name = {name: role_by_name(spec, conv1d) for name, spec in tensors.items()}
    fused = [name for name, role in by_name.items() if role.name == "experts"]
    for up in (name for name in fused if name.endswith("gate_up_proj")):
        down = up.removesuffix("gate_up_proj") + "down_proj"
        if down in fused and _shapes_in_out([tensors[up].shape, tensors[down].shape]):
            by_name |= dict.fromkeys((up, down), Role("experts", transposed=True, origin="name"))
    identity = {name: name for name in tensors}
    if config.get("tie_word_embeddings"):
        embeddings = [name for name, role in by_name.items() if role.name == "embedding"]
        for head in (name for name, role in by_name.items() if role.name == "output_head"):
            same = [name for name in embeddings if tensors[name].shape == tensors[head].shape]
            identity[head] = same[0] if same else head
    return Roles(by_name, identity, source, from_architecture=False)


def role_by_name(spec: TensorSpec, conv1d: bool) -> Role:
    """The role that name and shape suggest. `conv1d`: this checkpoint stores GPT-2 style (in, out) weights."""
    name, ndim = spec.name, len(spec.shape)
    guess: RoleName = "other"
    if name.endswith("bias") and ndim <= 2:
        guess = "bias"
    elif _NORM.search(name):
        guess = "norm"
    elif ndim == 2 and _OUTPUT_HEAD.search(name):
        guess = "output_head"
    elif ndim == 2 and _EMBEDDING.search(name):
        guess = "embedding"
    elif ndim == 2 and conv1d and _CONV1D.search(name):
        return Role("conv1d", transposed=True, origin="name")
    elif ndim == 3 and "experts" in name:
        guess = "experts"
    elif ndim >= 3 and name.endswith("weight"):
        guess = "convolution"
    elif ndim == 2 and name.endswith("weight"):
        guess = "linear"
    return Role(guess, origin="name")


def _stores_conv1d(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a bias is as long as its weight's second side, not its first: then weights are (in, out)."""
    return any(_CONV1D.search(name) and _is_transposed(spec, tensors) for name, spec in tensors.items())


def _is_transposed(weight: TensorSpec, tensors: Mapping[str, TensorSpec]) -> bool:
    bias = tensors.get(weight.name.removesuffix("weight") + "bias")
    if bias is None or len(weight.shape) != 2 or len(bias.shape) != 1:
        return False
    return bias.shape[0] == weight.shape[1] != weight.shape[0]
