"""The model that a configuration describes, built without memory and without asking anybody."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from acemerge.errors import CheckpointError, shown
from acemerge.models.bounded import TooManyParts, TooManySeconds, bounded
from acemerge.models.quiet import quiet_transformers

# Keys by which a config could ask transformers for code or files from elsewhere.
_REACHING_OUT = re.compile(
    r"auto_map|attn_implementation|experts_implementation|use_kernels|kernel_(config|mapping)|backbone|pretrained"
    r"|_name_or_path"
)
# A model has a few parts for each tensor of its checkpoint: modules, parameters, buffers.
_PARTS, _PARTS_EACH = 20_000, 4
_SECONDS = 60.0
_LEGIBLE = 10**18  # digits in threes up to here
# What Python itself may loop over before it makes a part: more than any model's, less than takes seconds.
_ITEMS, _NUMBER, _COUNT = 10_000, 1 << 24, 1 << 18
_COUNTS = re.compile(r"^num_|layers|depth")
# Numbers that nothing is counted by.
_NO_COUNT = re.compile(r"theta|_ids?$|pixels|param|flops?|bytes")


def meta_model(config: Mapping[str, Any], tensors: int) -> tuple[nn.Module | None, str]:
    """The model of `config` on the meta device, or None and why not. Its checkpoint has so many `tensors`.

    Whatever the config names, no code is fetched or run but transformers' own, and the Hub is not asked. The work is
    bounded, whatever its numbers are. Raises CheckpointError for one that takes too long: a faster machine might build
    it, and what is merged may not depend on that.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(config.get("model_type"), str):
        return None, "config.json names no architecture"
    too_many = _too_many(config)
    if too_many:
        return None, f"config.json asks for {too_many}"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return None, "transformers is not installed: pip install 'acemerge[hf]'"
    name, parts = str(architectures[0])[:80], max(_PARTS, _PARTS_EACH * tensors)
    with quiet_transformers(offline=True):
        try:
            cls: Any = getattr(transformers, name, None)
            if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
                return None, f"transformers has no {name!r}"
            with bounded(parts, _SECONDS):
                return _built(cls, config), ""
        except TooManyParts:
            return None, f"{name} would have more than {parts:,} parts"
        except TooManySeconds:
            what = f"describes a {name} that was not built in {_SECONDS:g} seconds"
            raise CheckpointError("config.json", what, "mend its numbers: they are no such model's") from None
        except Exception as failure:  # whatever an odd config makes the architecture raise
            return None, f"{name} could not be built: {type(failure).__name__}"


def _built(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    settings = {**_sanitised(config), "attn_implementation": "eager"}
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(settings))
        model.tie_weights()  # type: ignore[operator]
    return model


def _sanitised(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return [_sanitised(item) for item in config] if isinstance(config, list) else config
    return {key: _sanitised(value) for key, value in config.items() if not _is_left_out(key, value)}


def _is_left_out(key: str, value: Any) -> bool:
    """A backbone that is described, and not named, reaches out no further than its description."""
    described = key == "backbone_config" and isinstance(value, Mapping)
    return key in ("torch_dtype", "dtype") or (_REACHING_OUT.search(key) is not None and not described)


def _too_many(config: Any, key: str = "") -> str:
    """The first number or list of the config that is beyond any model's, as `key = value`; else empty."""
    if isinstance(config, Mapping):
        return next((found for k, v in config.items() if (found := _too_many(v, str(k)))), "")
    if isinstance(config, list):
        if len(config) > _ITEMS:
            return f"{key} = {len(config):,} items"
        total = sum(item for item in config if isinstance(item, int))
        return _too_many(total, key) or next((found for item in config if (found := _too_many(item, key))), "")
    most = _COUNT if _COUNTS.search(key) else _NUMBER
    large = isinstance(config, int) and config > most and not _NO_COUNT.search(key)
    if not large:
        return ""
    return f"{key} = {config:,}" if config < _LEGIBLE else f"{key} = {shown(config)}"


def submodels_of(model: nn.Module) -> dict[str, str]:
    """The outermost models within a model by the type that their own configurations name: the beginning of their
    parameters' names. None of a type that is there twice.
    """
    whole = getattr(getattr(model, "config", None), "model_type", None)
    found: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        within = any(path.startswith(prefix) for _, prefix in found)
        if isinstance(kind, str) and kind != whole and not within:
            found.append((kind, f"{path}."))
    kinds = [kind for kind, _ in found]
    return {kind: prefix for kind, prefix in found if kinds.count(kind) == 1}
