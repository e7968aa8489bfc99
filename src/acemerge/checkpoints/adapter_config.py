"""What `adapter_config.json` says of an adapter's weights.

It is read as data. What it may say is listed here: a feature that is not known to leave the merged weights alone is
refused, never passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acemerge.checkpoints.patterns import Budget, Pattern, PatternError, PatternTable
from acemerge.errors import CheckpointError

# Keys that say how an adapter was trained or found, not what its weights are. Which way a layer is stored
# (`fan_in_fan_out`) the base itself tells.
# fmt: off
_HARMLESS = frozenset((
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "qalora_group_size", "runtime_config"
))
_READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "init_lora_weights", "modules_to_save", "target_parameters", "ensure_weight_tying"
))
# fmt: on
# Other beginnings change the base's own weights too, and are written down nowhere.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")
MERGE_FIRST = "merge it into its base with peft (merge_and_unload) and name that folder"
# The order in which transformers registers the parameters of fused experts.
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
_MAX_TABLE = 100_000


@dataclass(frozen=True)
class AdapterSettings:
    """Rank and alpha, with the patterns that give some modules their own; what is saved whole or wrapped by itself.

    `parameters` are those that are wrapped by themselves, by the end of their modules' names.
    """

    rank: int
    alpha: float
    ranks: PatternTable
    alphas: PatternTable
    rslora: bool
    dora: bool
    biases: bool
    saved: tuple[str, ...]
    parameters: Mapping[str, frozenset[str]]
    path: Path

    def scaling(self, module: str) -> tuple[int, float]:
        """The rank of a module and its factor: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA."""
        try:
            rank = int(self.ranks.find(module, self.rank))
            alpha = self.alphas.find(module, self.alpha)
        except PatternError as failure:
            raise CheckpointError(
                self.path, f"its table of patterns {failure}", "write the modules' names out"
            ) from None
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether a tensor is of a module that was trained as a copy: as PEFT has it, one of these names ends it."""
        try:
            self.ranks.budget.take(1 + len(self.saved) // 5, next(iter(self.saved), ""))
        except PatternError as failure:
            raise CheckpointError(self.path, f"its list modules_to_save {failure}", "name fewer modules") from None
        return any(f"{saved}." in name for saved in self.saved)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """The parameters of a module that are wrapped by themselves, in the order in which it registers them.

        None where that is not known.
        """
        parts = module.split(".")
        ends = [end for i in range(len(parts)) if (end := ".".join(parts[i:]))]
        fused = [""] if "expert" in parts[-1] else []  # a parameter's name alone is of fused experts
        found = frozenset[str]().union(*(self.parameters.get(end, frozenset()) for end in (*ends, *fused)))
        if len(found) > 1 and not found <= {*_REGISTERED}:
            return ()
        return tuple(sorted(found, key=lambda name: _REGISTERED.index(name) if name in _REGISTERED else -1))


def read_adapter_settings(config: Mapping[str, Any], path: Path) -> AdapterSettings:
    """CheckpointError for a configuration that says what cannot be read."""
    if config.get("peft_type") != "LORA":
        what = f"peft_type is {str(config.get('peft_type'))[:40]!r}, and only LORA can be read"
        raise CheckpointError(path, what, MERGE_FIRST)
    for key, value in config.items():
        if key not in _HARMLESS and key not in _READ and value not in (None, False, [], {}):
            cure = f"{MERGE_FIRST}, or remove the key if it does not change the weights"
            raise CheckpointError(path, f"{key[:80]!r} is set, which cannot be read", cure)
    beginning = config.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        what = f"init_lora_weights is {str(beginning)[:40]!r}, which may have changed the base's weights"
        raise CheckpointError(path, what, MERGE_FIRST)
    budget = Budget()
    return AdapterSettings(
        int(_number(config, "r", path, 8, whole=True)),
        _number(config, "lora_alpha", path, 8),
        _patterns(config, "rank_pattern", path, budget, whole=True),
        _patterns(config, "alpha_pattern", path, budget),
        _flag(config, "use_rslora", path),
        _flag(config, "use_dora", path),
        config.get("bias", "none") != "none",
        # With `ensure_weight_tying` PEFT ties the copies as the base ties the modules.
        () if _flag(config, "ensure_weight_tying", path) else _names(config, "modules_to_save", path),
        _by_module(_names(config, "target_parameters", path)),
        path,
    )


def _by_module(targets: Sequence[str]) -> dict[str, frozenset[str]]:
    """The parameters that stand behind the end of each module's name."""
    found: dict[str, set[str]] = {}
    for target in targets:
        module, _, parameter = target.rpartition(".")
        found.setdefault(module, set()).add(parameter)
    return {module: frozenset(names) for module, names in found.items()}


def _names(config: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = config.get(key) or []
    if not isinstance(names, list) or len(names) > _MAX_TABLE or not all(isinstance(n, str) and n for n in names):
        raise CheckpointError(path, f"{key!r} is no list of names", "mend the file")
    return tuple(names)


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key) or False
    if value not in (True, False):
        raise CheckpointError(path, f"{key!r} is {str(value)[:40]!r}, not true or false", "mend the file")
    return bool(value)


def _number(
    config: Mapping[str, Any], key: str, path: Path, default: float | None = None, whole: bool = False
) -> float:
    value = config.get(key, default)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not abs(value) < 1 << 30 or (whole and value < 1):
        what = f"{key[:80]!r} is {str(value)[:40]!r}, not a {'rank' if whole else 'number'}"
        raise CheckpointError(path, what, "mend the file")
    return float(value)


def _patterns(config: Mapping[str, Any], key: str, path: Path, budget: Budget, whole: bool = False) -> PatternTable:
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > _MAX_TABLE:
        raise CheckpointError(path, f"{key!r} is no table", "mend the file")
    entries = []
    for text in table:
        try:
            pattern = Pattern.read(text, budget)
        except PatternError as failure:
            raise CheckpointError(path, f"{key!r}: {text[:80]!r} {failure}", "write the modules' names out") from None
        entries.append((pattern, _number(table, text, path, whole=whole)))
    return PatternTable(tuple(entries), budget)
