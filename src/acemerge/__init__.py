"""Merge fine-tuned models into one, without data."""

from acemerge.api import MergeReport, merge, merge_deltas, merge_models, merge_state_dicts
from acemerge.errors import AcemergeError, CheckpointError, NumericalError, UsageError, WriteError
from acemerge.methods import METHODS, LayerResult, Method, register

__all__ = [
    "METHODS",
    "AcemergeError",
    "CheckpointError",
    "LayerResult",
    "MergeReport",
    "Method",
    "NumericalError",
    "UsageError",
    "WriteError",
    "merge",
    "merge_deltas",
    "merge_models",
    "merge_state_dicts",
    "register",
]
