"""What a rule says of itself: to be printed, and to be asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from acemerge.methods.base import Method, parameter_fields

# Every rule of this library by its family, with a line that fits a terminal's.
_LINES: Mapping[str, Mapping[str, str]] = {
    "Covariance: weighted least squares": {
        "kron_auto": "weighted by inputs and outputs, nothing to tune",
        "ace": "ACE-Merging, exactly as published",
        "ace_auto": "ACE without its constants, nothing to tune",
        "anchored": "pulled towards the sum of the updates",
        "kron": "weighted by inputs and outputs",
        "actmat": "ACTMat: each update's own second moment as its task's",
        "tact": "TACT: as ACTMat, from the largest entries alone",
        "cauchy": "a fit again and again, far experts counting less",
        "wudi": "WUDI: gradient descent on the interference",
        "swudi_a": "SWUDI-A: the minimiser of WUDI's loss",
    },
    "Spectral: singular values and vectors": {
        "tsv_m": "TSV-M: leading singular vectors, made orthogonal",
        "iso_c": "Iso-C: the sum, with all singular values equal",
        "iso_cts": "Iso-CTS: common directions, then each expert's own",
        "dc_merge": "DC-Merge: directions of all in one space, then a vote",
        "cart": "CART: the mean, and low-rank parts beyond it",
        "svc": "another rule, its singular values calibrated",
    },
    "For adapters, around another rule": {
        "knots": "KnOTS: merged in the left directions in common",
        "core_space": "core space: merged in the directions of either side",
    },
    "Around another rule": {
        "trust": "another rule's update, no longer than its fit holds",
    },
    "Sparse: with votes or chance": {
        "ties": "TIES: trim, elect a sign, average those that agree",
        "dare_linear": "DARE: drop entries by chance, then sum",
        "dare_ties": "DARE, then the election of TIES",
        "della": "DELLA: as dare_ties, large entries survive more often",
        "breadcrumbs": "drop the largest and the smallest entries, then sum",
        "consensus": "keep entries that two experts want, then sum",
        "emr": "one model, with a mask for each expert",
    },
    "Linear and spherical": {
        "average": "weighted mean of the updates",
        "task_arithmetic": "sum of the updates, times scale",
        "model_stock": "the mean, shrunk by the angle between the experts",
        "slerp": "two experts, or one and the base, along the sphere",
        "karcher": "the mean of any number on the sphere",
    },
    "With data, for each expert": {
        "regmean": "RegMean: outputs nearest to each expert's",
        "regmean_pp": "RegMean++: block by block, inputs as merged so far",
        "kfac": "weighted by inputs and outputs, as measured",
        "esm": "ESM: output directions that inputs move most",
        "fisher": "weights averaged by their Fisher information",
    },
    "As mergekit has them": {
        "mergekit_linear": "linear, with normalize: false",
        "mergekit_sum": "task arithmetic with its options",
        "mergekit_slerp": "slerp of two models",
        "mergekit_sce": "SCE: where experts differ most",
        "mergekit_multislerp": "slerp of any number, about their mean",
        "mergekit_nearswap": "entries near the base's swapped for the expert's",
        "mergekit_ram": "RAM: the mean of those that changed an entry",
        "arcee_fusion": "Arcee fusion: outliers of importance",
    },
}
_OTHERS = "Of other packages"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a rule: what it means, and the values to choose from where these are few."""

    name: str
    default: Any
    meaning: str
    choices: tuple[Any, ...] = ()


def summary(rule: type[Method]) -> str:
    """The first paragraph of its description."""
    return " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())


def line(rule: type[Method]) -> str:
    """In a few words; of a rule that is not this library's own, its first paragraph."""
    return next((lines[rule.name] for lines in _LINES.values() if rule.name in lines), "") or summary(rule)


def families(rules: Mapping[str, type[Method]]) -> dict[str, list[type[Method]]]:
    """The rules by family, in the order of the table above; those that are not in it come last."""
    known = {family: [rules[name] for name in lines if name in rules] for family, lines in _LINES.items()}
    listed = {rule.name for found in known.values() for rule in found}
    known[_OTHERS] = [rule for name, rule in rules.items() if name not in listed]
    return {family: found for family, found in known.items() if found}


def parameters(rule: type[Method]) -> list[Parameter]:
    """Its parameters in their order."""
    plain, described = get_type_hints(rule), get_type_hints(rule, include_extras=True)
    return [
        Parameter(field.name, field.default, _meaning(described[field.name]), _choices(plain[field.name]))
        for field in parameter_fields(rule)
    ]


def _meaning(hint: Any) -> str:
    """Its description; where its type has bounds of its own, these come first and say nothing."""
    notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, FieldInfo)]
    return next((note.description for note in notes if note.description), "")


def _choices(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (False, True)
    return get_args(hint) if get_origin(hint) is Literal else ()
