"""Merge fine-tuned models into one, without data."""

from acemerge.api import MergeReport, merge
from acemerge.errors import AcemergeError, CheckpointError, NumericalError, UsageError, WriteError
from acemerge.in_memory import merge_deltas, merge_models, merge_state_dicts
from acemerge.masks import expert_weights
from acemerge.methods import METHODS, Layer, LayerResult, Method, Needs, register

__all__ = [
    "METHODS",
    "AcemergeError",
    "CheckpointError",
    "Layer",
    "LayerResult",
    "MergeReport",
    "Method",
    "Needs",
    "NumericalError",
    "UsageError",
    "WriteError",
    "expert_weights",
    "merge",
    "merge_deltas",
    "merge_models",
    "merge_state_dicts",
    "register",
]
