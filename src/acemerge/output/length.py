"""How far a merge moves the weights, beside its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

from acemerge.methods import DEFAULT, METHODS, rule_name
from acemerge.output.shares import Records, energies_of

# Longer than this the result is in nobody's direction: twice the longest expert's, or more than what updates at right
# angles to one another add up to, by more than rounding and chance.
_TWICE, _BEYOND = 2.0, 1.1


@dataclass(frozen=True)
class Length:
    """Norms over all layers, and what was merged like them: of the merged update, of the longest expert's, and
    `orthogonal`, what the experts' would add up to at right angles, `sqrt(sum_t ||D_t||_F^2)`. `worst` is the layer
    whose merged update is longest beside its longest expert's, `worst_ratio` how many times so long. `base` is the
    norm of the weights themselves before, `farthest` the layer whose weights are moved most beside them, by
    `farthest_ratio` of their norm; None where a manifest has not kept them.
    """

    merged: float
    longest: float
    orthogonal: float
    worst: str
    worst_ratio: float
    base: float | None = None
    farthest: str | None = None
    farthest_ratio: float | None = None

    @property
    def overshoots(self) -> bool:
        return self.merged > _TWICE * self.longest or self.merged > _BEYOND * self.orthogonal

    def __str__(self) -> str:
        beside = f"{self.merged / self.longest:.2g} times the longest expert's"
        added = f"{self.merged / self.orthogonal:.2g} times all at right angles"
        ratios = f"{beside}, {added}; most in {self.worst}, {self.worst_ratio:.2g} times"
        if not self.base:
            return ratios
        return f"{ratios}; {self.merged / self.base:.2g} of the weights themselves, at most {self.farthest_ratio:.2g}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def length_of(labels: Sequence[str], records: Records) -> Length | None:
    """None where no layer was merged from updates of all experts."""
    return _length(labels, {name: record for name, record in records.items() if record.is_layer})


def length_of_tokens(labels: Sequence[str], records: Records) -> Length | None:
    """That of embeddings and output heads that were merged like layers."""
    return _length(labels, {name: record for name, record in records.items() if record.has_tokens})


def _length(labels: Sequence[str], records: Records) -> Length | None:
    layers = dict(_energies(labels, records))
    before = {name: records[name].base_energy or 0.0 for name in layers}
    totals = [sum(column) for column in zip(*(energies for _, energies in layers.values()), strict=True)]
    if not any(totals):
        return None
    ratios = {name: sqrt(merged / max(energies)) for name, (merged, energies) in layers.items() if max(energies) > 0}
    worst = max(ratios, key=lambda name: ratios[name])
    merged = sum(merged for merged, _ in layers.values())
    length = Length(sqrt(merged), sqrt(max(totals)), sqrt(sum(totals)), worst, ratios[worst])
    steps = {name: sqrt(layers[name][0] / energy) for name, energy in before.items() if energy > 0}
    if not steps:
        return length
    farthest = max(steps, key=lambda name: steps[name])
    base = sqrt(sum(before.values()))
    return replace(length, base=base, farthest=farthest, farthest_ratio=steps[farthest])


def _energies(labels: Sequence[str], records: Records) -> Iterator[tuple[str, tuple[float, Sequence[float]]]]:
    for name, record in records.items():
        energies = energies_of(record, labels)
        if energies and record.merged_energy is not None:
            yield name, (record.merged_energy, energies)


def tokens_warning(length: Length, recipe: Mapping[str, Any]) -> str:
    """What a merge is told whose embeddings or output heads overshoot."""
    by = _own_rule(length.worst, recipe)
    what = f"the rule {by['match']!r}" if by else "`embeddings: rule`"
    cure = _of_mergekit(by) or f"average them, as without {what}"
    return f"embeddings and heads by the rule overshoot, {length}; {cure}"


def length_warning(length: Length, recipe: Mapping[str, Any]) -> str:
    """What an overshooting merge is told, with cures that fit its rule."""
    return f"the merged update overshoots, {length}: it may be in nobody's direction; {length_cure(length, recipe)}"


def length_cure(length: Length, recipe: Mapping[str, Any]) -> str:
    """What brings it back to the experts' length, by its rule's own means."""
    by = _own_rule(length.worst, recipe)
    if by:  # options change the merge's own method only
        return _of_mergekit(by) or f"smaller weights, a smaller scale or another method in the rule {by['match']!r}"
    method = str(recipe.get("method", {}).get("name", ""))
    eps = "a larger eps, as --set eps=1e-2, " if method == "ace" else ""
    given = recipe.get("scale") or recipe.get("method", {}).get("scale") or getattr(METHODS.get(method), "scale", 1.0)
    scale = min(length.orthogonal, _TWICE * length.longest) / length.merged * float(given)
    rule = "another rule" if method == rule_name(DEFAULT) else f"--method {DEFAULT}"
    return f"{eps}--scale {scale:.2g}, or {rule} is nearer to them"


def _own_rule(name: str, recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rule of the recipe that a tensor is merged by, where it has a method of its own."""
    found = (rule for rule in recipe.get("rules", ()) if fnmatchcase(name, rule["match"]))
    return next((rule if rule.get("method") else None for rule in found), None)


def _of_mergekit(rule: Mapping[str, Any] | None) -> str:
    """The cure in a recipe of mergekit's, whose tensors all have rules of their own; else empty."""
    return "smaller weights in the recipe" if rule and rule["method"]["name"].startswith("mergekit_") else ""
