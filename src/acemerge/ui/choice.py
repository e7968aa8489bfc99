"""What was picked on the page, made into a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from acemerge.errors import UsageError
from acemerge.methods import METHODS, load_installed, make
from acemerge.methods.about import families, parameters
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.ui.folders import Folders


def rules() -> dict[str, str]:
    """The rules to choose from, by family, and what the page calls them. Those that are there for mergekit's recipes
    belong to files, and those that ask for data to task files.
    """
    load_installed()
    named = [name for name in METHODS if not name.startswith("mergekit_")]
    offered = {name: METHODS[name] for name in named if make(name, {}).needs.calibration is None}
    return {rule.name: f"{family}: {rule.name}" for family, found in families(offered).items() for rule in found}


@dataclass(frozen=True)
class Choice:
    """What was picked. `weights` are numbers with commas between them, one for each expert, or nothing.

    `values` are the rule's parameters; an empty one is the rule's own default.
    """

    base: str | None
    experts: Sequence[str]
    rule: str = "ace"
    weights: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, folders: Folders) -> Recipe:
        """The recipe that it stands for. UsageError for what is missing, wrong or outside the folders."""
        return make_recipe(self.content(folders), "page")

    def content(self, folders: Folders) -> dict[str, Any]:
        """The same as a recipe file holds it, without what is a default."""
        if not self.base:
            raise UsageError("base", "none is picked", "pick the model that all experts were fine-tuned from")
        if not self.experts:
            raise UsageError("experts", "none is picked", "pick at least one fine-tuned model")
        base, *experts = (folders.name(folders.inside(name)) for name in (self.base, *self.experts))
        weighted = zip(experts, self._weights(), strict=True)
        named: list[Any] = [name if weight == 1 else {"model": name, "weight": weight} for name, weight in weighted]
        return {"method": self._method(), "base": base, "experts": named}

    def yaml(self, folders: Folders) -> str:
        """The text of a recipe file; its folders are relative to the one that it is saved in, the current one."""
        return yaml.safe_dump(self.content(folders), sort_keys=False, allow_unicode=True)

    def _weights(self) -> list[float]:
        words = self.weights.replace(",", " ").split()
        try:
            found = [float(word) for word in words] or [1.0] * len(self.experts)
        except ValueError:
            raise UsageError("weights", f"{self.weights!r} are no numbers", "write for example 1, 0.5, 1") from None
        if len(found) != len(self.experts):
            what = f"{len(found)} weights for {len(self.experts)} experts"
            raise UsageError("weights", what, "give one for each, in the order of the experts, or none")
        return found

    def _method(self) -> dict[str, Any]:
        """The rule and those of its parameters that differ from their defaults, as the values that they stand for."""
        method = make(self.rule, {name: value for name, value in self.values.items() if value not in (None, "")})
        values = {p.name: getattr(method, p.name) for p in parameters(METHODS[self.rule])}
        return {"name": self.rule} | {
            p.name: values[p.name] for p in parameters(METHODS[self.rule]) if values[p.name] != p.default
        }
