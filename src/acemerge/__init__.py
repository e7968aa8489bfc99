"""Merge fine-tuned models into one, without data."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acemerge.api import merge
    from acemerge.calibration.moments import input_second_moments
    from acemerge.engine.in_memory import merge_models, merge_state_dicts
    from acemerge.engine.one_layer import merge_deltas, merge_factors
    from acemerge.errors import AcemergeError, CheckpointError, NumericalError, ResourceError, UsageError, WriteError
    from acemerge.methods import METHODS, Layer, LayerResult, LayerStats, LowRankResult, Method, Needs, Status, register
    from acemerge.output.expert_weights import expert_weights
    from acemerge.output.merge_report import MergeReport

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent, unless who uses it asks for more

__all__ = [
    "METHODS",
    "AcemergeError",
    "CheckpointError",
    "Layer",
    "LayerResult",
    "LayerStats",
    "LowRankResult",
    "MergeReport",
    "Method",
    "Needs",
    "NumericalError",
    "ResourceError",
    "Status",
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
    "api": ("merge",),
    "calibration.moments": ("input_second_moments",),
    "errors": ("AcemergeError", "CheckpointError", "NumericalError", "ResourceError", "UsageError", "WriteError"),
    "engine.in_memory": ("merge_models", "merge_state_dicts"),
    "engine.one_layer": ("merge_deltas", "merge_factors"),
    "output.expert_weights": ("expert_weights",),
    "output.merge_report": ("MergeReport",),
    "methods": (
        "METHODS",
        "Layer",
        "LayerResult",
        "LayerStats",
        "LowRankResult",
        "Method",
        "Needs",
        "Status",
        "register",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: torch takes seconds, and the command line sets it up first."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("acemerge")
    if name not in _HOME:
        raise AttributeError(f"module 'acemerge' has no attribute {name!r}")
    if name == "METHODS":
        _load_installed()
    return getattr(importlib.import_module(f"acemerge.{_HOME[name]}"), name)


@functools.cache
def _load_installed() -> None:
    """Rules of other packages belong to all rules; of one that does not load it is logged why."""
    for failure in importlib.import_module("acemerge.methods").load_installed():
        logging.getLogger(__name__).warning("%s", failure)
