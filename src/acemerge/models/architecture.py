"""The model that a configuration describes, built without memory and without asking anybody."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from acemerge.models.quiet import quiet_transformers

# Keys by which a config could ask transformers for code or files from elsewhere.
_REACHING_OUT = re.compile(
    r"auto_map|attn_implementation|experts_implementation|kernel|backbone|pretrained|_name_or_path"
)
# Keys whose values may be large without making the model deep.
_WIDTHS = re.compile(r"vocab|position|size|dim|token|_id$|_ids$|length|window|theta|channels|factor|width|scale")
_DEPTHS = re.compile(r"layer|depth|block|stage|num_")


def meta_model(config: Mapping[str, Any], most: int) -> tuple[nn.Module | None, str]:
    """The model of `config` on the meta device, or None and why not.

    Whatever the config names, no code is fetched or run but transformers' own, and the Hub is not asked.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(config.get("model_type"), str):
        return None, "config.json names no architecture"
    too_many = _too_many(config, most)
    if too_many:
        return None, f"config.json asks for {too_many}"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return None, "transformers is not installed: pip install 'acemerge[hf]'"
    name = str(architectures[0])[:80]
    with quiet_transformers(offline=True):
        try:
            cls: Any = getattr(transformers, name, None)
            if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
                return None, f"transformers has no {name!r}"
            settings = {**_sanitised(config), "attn_implementation": "eager"}
            built = cls.config_class.from_dict(settings)  # type: ignore[attr-defined]
            with torch.device("meta"):
                model: Any = cls(built)
                model.tie_weights()
        except Exception as failure:  # whatever an odd config makes the architecture raise
            return None, f"{name} could not be built: {type(failure).__name__}"
    return model, ""


def _sanitised(config: Any) -> Any:
    if isinstance(config, Mapping):
        ours = ("torch_dtype", "dtype")
        return {k: _sanitised(v) for k, v in config.items() if k not in ours and not _REACHING_OUT.search(k)}
    return [_sanitised(item) for item in config] if isinstance(config, list) else config


def _too_many(config: Any, most: int, key: str = "") -> str:
    """The first count in the config that would make building it endless, as `key = value`; else empty."""
    if isinstance(config, Mapping):
        return next((found for k, v in config.items() if (found := _too_many(v, most, str(k)))), "")
    if isinstance(config, list):
        return next((found for item in config if (found := _too_many(item, most, key))), "")
    wide = _WIDTHS.search(key) and not _DEPTHS.search(key)
    large = isinstance(config, int) and config > most and not wide
    return f"{key} = {config:,}" if large else ""


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
