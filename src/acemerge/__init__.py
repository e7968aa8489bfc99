"""Merge fine-tuned models into one, without data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acemerge.api import MergeReport, merge
    from acemerge.calibration.moments import input_second_moments
    from acemerge.engine.in_memory import merge_deltas, merge_factors, merge_models, merge_state_dicts
    from acemerge.errors import AcemergeError, CheckpointError, NumericalError, ResourceError, UsageError, WriteError
    from acemerge.methods import METHODS, Layer, LayerResult, LowRankResult, Method, Needs, register
    from acemerge.output.expert_weights import expert_weights

__all__ = [
    "METHODS",
    "AcemergeError",
    "CheckpointError",
    "Layer",
    "LayerResult",
    "LowRankResult",
    "MergeReport",
    "Method",
    "Needs",
    "NumericalError",
    "ResourceError",
    "UsageError",
    "WriteError",
    "expert_weights",
    "input_second_moments",
    "merge",
    "merge_deltas",
    "merge_factors",
    "merge_models",
    "merge_state_dicts",
    "register",
]

_HOMES = {
    "api": ("MergeReport", "merge"),
    "calibration.moments": ("input_second_moments",),
    "errors": ("AcemergeError", "CheckpointError", "NumericalError", "ResourceError", "UsageError", "WriteError"),
    "engine.in_memory": ("merge_deltas", "merge_factors", "merge_models", "merge_state_dicts"),
    "output.expert_weights": ("expert_weights",),
    "methods": ("METHODS", "Layer", "LayerResult", "LowRankResult", "Method", "Needs", "register"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: torch takes seconds, and the command line sets it up first."""
    if name not in _HOME:
        raise AttributeError(f"module 'acemerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"acemerge.{_HOME[name]}"), name)
