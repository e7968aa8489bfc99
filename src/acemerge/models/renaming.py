"""What transformers does to names and tensors of a checkpoint when it loads them into a model of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn


def checkpoint_renaming(model: nn.Module) -> Callable[[str], tuple[str, str]]:
    """Checkpoint name -> parameter name, as transformers itself does on loading; and the pattern of what is converted
    then, empty where the tensor is all of the parameter as it is.
    """
    transforms = transforms_of(model)
    if transforms is None:  # an older transformers, or a plain nn.Module: names are the same
        return lambda name: (name, "")
    (renamings, converters), state = transforms, model.state_dict()
    rename_key: Any = importlib.import_module("transformers.core_model_loading").rename_source_key
    prefix = str(getattr(model, "base_model_prefix", ""))

    def rename(name: str) -> tuple[str, str]:
        parameter, pattern = rename_key(name, renamings, converters, prefix, state)
        return str(parameter), str(pattern or "")

    return rename


def transforms_of(model: nn.Module) -> tuple[list[Any], list[Any]] | None:
    """How transformers renames and converts what it loads into a model of its own; None where it does not."""
    try:
        converter = importlib.import_module("transformers.core_model_loading").WeightConverter
        found = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):
        return None
    return [t for t in found if not isinstance(t, converter)], [t for t in found if isinstance(t, converter)]
