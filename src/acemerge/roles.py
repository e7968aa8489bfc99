"""What each tensor is: asked of the architecture where transformers knows it, else told by name and shape."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from acemerge.checkpoints.header import TensorSpec

RoleName = Literal["linear", "conv1d", "experts", "embedding", "output_head", "convolution", "norm", "bias", "other"]


@dataclass(frozen=True)
class Role:
    """`transposed` weights are stored (in, out); `origin` says who told."""

    name: RoleName
    transposed: bool = False
    origin: Literal["architecture", "name"] = "architecture"


@dataclass(frozen=True)
class Roles:
    """The role of every tensor, and `tied`: each other spelling of a shared tensor -> its first name."""

    by_name: Mapping[str, Role]
    tied: Mapping[str, str]
    source: str


def find_roles(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Roles:
    """Roles from the model that `config` describes, built without memory on the meta device.

    Tensors that the architecture does not name, and all of them where it cannot be built, are told by name
    and shape; `Roles.source` says so.
    """
    model, why_not = _meta_model(config, most_layers=max(1000, len(tensors)))
    if model is None:
        return roles_by_name(tensors, config, f"names and shapes ({why_not})")
    return roles_from_model(model, tensors, f"the architecture {type(model).__name__}")


def roles_from_model(model: nn.Module, tensors: Mapping[str, TensorSpec], source: str) -> Roles:
    """Roles from the modules of `model`, whose checkpoint names may differ from its parameter names."""
    in_model = _roles_of_parameters(model)
    rename = _checkpoint_renaming(model)
    conv1d = any(role.name == "conv1d" for role in in_model.values())
    by_name = {}
    for name, spec in tensors.items():
        role = in_model.get(rename(name))
        if role is not None and role.name == "experts" and len(spec.shape) == 2:
            role = Role("linear")  # one expert's matrix, fused only in memory
        by_name[name] = role or role_by_name(spec, conv1d)
    tied = _tied_spellings(model)
    groups: dict[str, str] = {}
    tied_names = {}
    for name in tensors:
        parameter = tied.get(rename(name))
        if parameter is not None:
            first = groups.setdefault(parameter, name)
            if first != name:
                tied_names[name] = first
    return Roles(by_name, tied_names, source)


def _meta_model(config: Mapping[str, Any], most_layers: int) -> tuple[nn.Module | None, str]:
    """The model of `config` on the meta device, or None and why not. No code named by the config is run."""
    for key, value in config.items():
        if "layer" in key and isinstance(value, int) and value > most_layers:
            return None, f"config.json asks for {key} = {value:,}"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return None, "transformers is not installed: pip install 'acemerge[hf]'"
    architectures = config.get("architectures")
    model_type = config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(model_type, str):
        return None, "config.json names no architecture"
    cls: Any = getattr(transformers, str(architectures[0]), None)
    if cls is None or not issubclass(cls, transformers.PreTrainedModel) or cls.config_class is None:
        return None, f"transformers has no {str(architectures[0])[:80]!r}"
    with _quiet(logging.getLogger("transformers")):
        try:
            settings = {k: v for k, v in config.items() if k not in ("auto_map", "torch_dtype", "dtype")}
            built = cls.config_class.from_dict(settings)
            with torch.device("meta"):
                model: nn.Module = cls(built)
                cast(Any, model).tie_weights()
        except Exception as failure:  # whatever an odd config makes the architecture raise
            return None, f"{architectures[0]} could not be built: {type(failure).__name__}"
    return model, ""


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silences transformers' own messages: what matters is said by the plan."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _roles_of_parameters(model: nn.Module) -> dict[str, Role]:
    get_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    roles = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            roles[dot + name] = _role_of_parameter(module, name, parameter.ndim, module is head)
        for name, buffer in module.named_buffers(recurse=False):
            roles[dot + name] = Role("norm" if buffer is not None and _is_norm(module) else "other")
    return roles


def _role_of_parameter(module: nn.Module, name: str, ndim: int, is_output_head: bool) -> Role:
    if name.endswith("bias"):
        return Role("bias")
    if isinstance(module, nn.Embedding):
        return Role("embedding")
    if _is_norm(module):
        return Role("norm")
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role("convolution")
    if is_output_head:
        return Role("output_head")
    if type(module).__name__ == "Conv1D":
        return Role("conv1d", transposed=True)
    if ndim == 3 and "expert" in type(module).__name__.lower():
        return Role("experts", transposed=bool(getattr(module, "is_transposed", False)))
    if ndim == 2 and (isinstance(module, nn.Linear) or name.endswith("weight")):
        return Role("linear")
    return Role("embedding" if ndim == 2 and "embed" in name else "other")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _checkpoint_renaming(model: nn.Module) -> Callable[[str], str]:
    """Checkpoint name -> parameter name, by the renamings that transformers itself applies on loading."""
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        transforms = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # an older transformers, or a plain nn.Module: names are the same
        return lambda name: name
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, loading.WeightConverter)]
    state = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    return lambda name: str(loading.rename_source_key(name, renamings, converters, prefix, state)[0])


def _tied_spellings(model: nn.Module) -> dict[str, str]:
    """Parameter name -> first name of the parameter that it shares, for parameters with several names."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = tied[owner] = owner
    return tied


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
    tied = {}
    if config.get("tie_word_embeddings"):
        heads = [name for name, role in by_name.items() if role.name == "output_head"]
        embeddings = [name for name, role in by_name.items() if role.name == "embedding"]
        for head in heads:
            same = [name for name in embeddings if tensors[name].shape == tensors[head].shape]
            if same:
                tied[head] = same[0]
    return Roles(by_name, tied, source)


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


def summarise(roles: Iterable[Role]) -> str:
    """How many roles came from where, for the plan's first lines."""
    counts = {"architecture": 0, "name": 0}
    for role in roles:
        counts[role.origin] += 1
    return ", ".join(f"{count} by {origin}" for origin, count in counts.items() if count)
