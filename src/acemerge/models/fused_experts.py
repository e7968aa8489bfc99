"""Matrices of a mixture's experts that lie apart in a checkpoint and are one parameter in memory."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

_NUMBER = re.compile(r"\.experts\.(\d+)\.")
# What transformers does with an expert's matrices on loading, and we know to undo for a low-rank update.
_STACKING = ("MergeModulelist", "Concatenate")


@dataclass(frozen=True)
class ExpertPart:
    """The `part`-th of `parts` shares of the rows of expert `number` in a parameter (expert, out, in)."""

    parameter: str
    number: int
    part: int
    parts: int


def expert_parts(model: nn.Module, names: Iterable[str]) -> dict[str, ExpertPart]:
    """The checkpoint's tensors that are parts of fused parameters; none where transformers stacks them otherwise."""
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        transforms = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # an older transformers, or a plain nn.Module
        return {}
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, loading.WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), str(getattr(model, "base_model_prefix", ""))
    found = {}
    for name in names:
        number = _NUMBER.search(name)
        if not number:
            continue
        parameter, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        converter = of_pattern.get(pattern)
        if converter is None or {type(op).__name__ for op in converter.operations} - {*_STACKING}:
            continue
        sources = list(converter.source_patterns)
        found[name] = ExpertPart(str(parameter), int(number[1]), sources.index(pattern), len(sources))
    return found


def stored_in_out(model: nn.Module) -> frozenset[str]:
    """The parameters of modules that say that they are (expert, in, out)."""
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if getattr(module, "is_transposed", False) is True
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
