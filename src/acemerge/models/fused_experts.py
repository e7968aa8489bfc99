"""Matrices of a mixture's experts that lie apart in a checkpoint and are one parameter in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from acemerge.models.renaming import checkpoint_renaming, transforms_of

_NUMBER = re.compile(r"\.experts\.(\d+)\.")
# How transformers makes (experts, out, in) of matrices that are stored apart: all experts' first, then gate and up.
_FUSING = [("MergeModulelist", 0), ("Concatenate", 1)]


@dataclass(frozen=True)
class ExpertPart:
    """The `part`-th of `parts` shares of the rows of expert `number` in a parameter (expert, out, in)."""

    parameter: str
    number: int
    part: int
    parts: int


def expert_number(name: str) -> int | None:
    """The expert of a mixture whose matrix, stored apart, has this name; None for any other tensor."""
    numbers = _NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def expert_parts(model: nn.Module, names: Iterable[str]) -> dict[str, ExpertPart]:
    """The checkpoint's tensors that are parts of fused parameters; none where transformers stacks them otherwise."""
    _, converters = transforms_of(model) or ([], [])
    places: dict[str, tuple[int, int]] = {}
    for converter in converters:
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        patterns = list(converter.source_patterns)
        if steps == _FUSING or (steps == _FUSING[:1] and len(patterns) == 1):
            places |= {pattern: (part, len(patterns)) for part, pattern in enumerate(patterns)}
    rename, found = checkpoint_renaming(model), {}
    for name in names:
        number = expert_number(name)
        if places and number is not None:
            parameter, pattern = rename(name)
            if pattern in places:
                found[name] = ExpertPart(parameter, number, *places[pattern])
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
