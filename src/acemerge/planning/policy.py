"""Which tensor gets which rule: the recipe's own rules first, then the policy's table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import UsageError
from acemerge.methods import Method
from acemerge.methods.elementwise import Average
from acemerge.models.roles import Role
from acemerge.recipes.recipe import Recipe

Action = Literal["merge", "base", "heads"]


@dataclass(frozen=True)
class Decision:
    """What one tensor gets and why. `method` is set when it is merged, `weights` where they are not the experts'.
    `pool` is the number of the recipe's rule, -1 for the recipe's own method. `groups`: of a convolution that a rule
    gets as a matrix, or as one for each of so many groups.
    """

    action: Action
    reason: str
    method: Method | None = None
    weights: tuple[float, ...] | None = None
    pool: int = -1
    groups: int = 0


class Policy:
    """The recipe's decisions, with every rule built once."""

    def __init__(self, recipe: Recipe, model_type: str, names: Collection[str]) -> None:
        self._recipe = recipe
        self._main = recipe.build_method()
        # With `method: average` its own scale holds for every averaged tensor.
        self._average: Method = self._main if isinstance(self._main, Average) else Average()
        self._rules = [(rule, rule.method.build() if rule.method else None) for rule in recipe.rules]
        plain = [(i, rule.match) for i, (rule, _) in enumerate(self._rules) if not set(rule.match) & set("*?[")]
        self._plain = {match: i for i, match in reversed(plain)}
        self._patterns = [i for i, (rule, _) in enumerate(self._rules) if rule.match not in self._plain]
        self._family = _paper_family(model_type, names) if recipe.policy == "paper" else None

    @property
    def orientation(self) -> str:
        return "stored" if self._family else self._recipe.orientation

    def decide(self, spec: TensorSpec, role: Role) -> Decision:
        number = self._rule_for(spec.name)
        if number is None:
            return self._paper(self._family, spec) if self._family else self._default(spec, role)
        rule, method = self._rules[number]
        reason = f"recipe rule {rule.match!r}"
        if method is None:
            return Decision(rule.action or "base", reason)
        groups = role.groups if method.needs.matrix and _is_of_patches(spec, role) else 0
        if not groups:
            self._check_shape(spec, role, method)
        return Decision("merge", reason, method, rule.weights, number, groups)

    def _rule_for(self, name: str) -> int | None:
        """The first rule that matches. A recipe may name every tensor: plain names are looked up, not compared."""
        end = self._plain.get(name, len(self._rules))
        found = next((i for i in self._patterns if i < end and fnmatchcase(name, self._rules[i][0].match)), end)
        return found if found < len(self._rules) else None

    def _check_shape(self, spec: TensorSpec, role: Role, method: Method) -> None:
        if method.needs.matrix and len(spec.shape) != 2 and role.name != "experts":
            what = f"{method.name} needs a matrix, but the tensor has shape {list(spec.shape)}"
            raise UsageError(f"tensor {spec.name!r}", what, "narrow the rule's `match` or use an elementwise method")

    def _default(self, spec: TensorSpec, role: Role) -> Decision:
        if role.name == "linear":
            return self._merge("a linear layer's weight")
        if role.name == "conv1d":
            how = "as stored" if self._recipe.orientation == "stored" else "transposed to (out, in)"
            return self._merge(f"a Conv1D weight, stored (in, out), {how}")
        if role.name == "experts":
            return self._merge("fused experts, slice by slice")
        if role.name in ("embedding", "output_head"):
            return self._vocabulary(spec, role)
        if role.name == "convolution" and (self._recipe.convolutions == "rule" or _is_pointwise(spec)):
            return self._convolution(spec, role)
        what = {"norm": "a norm", "bias": "a bias", "convolution": "a convolution"}.get(role.name)
        return Decision("merge", f"{what or 'not a linear layer'}: averaged", self._average)

    def _convolution(self, spec: TensorSpec, role: Role) -> Decision:
        if not _is_of_patches(spec, role):
            return Decision("merge", "a convolution of one channel for each output: averaged", self._average)
        if self._main.needs.calibration in ("inputs", "merged inputs"):
            return Decision("merge", "a convolution, whose patches are not measured: averaged", self._average)
        each = f", for each of its {role.groups} groups" if role.groups > 1 else ""
        what = "over channels" if _is_pointwise(spec) else "of patches"
        return Decision("merge", f"a convolution: a linear layer {what}{each}", self._main, groups=role.groups)

    def _vocabulary(self, spec: TensorSpec, role: Role) -> Decision:
        what = "an embedding" if role.name == "embedding" else "an output head over the vocabulary"
        if self._recipe.embeddings == "base":
            return Decision("base", f"{what}: kept, as the recipe asks")
        if self._recipe.embeddings == "rule" and (len(spec.shape) == 2 or not self._main.needs.matrix):
            return self._merge(f"{what}: by the rule, as the recipe asks")
        return Decision("merge", f"{what}: a token Gram is no input covariance", self._average)

    def _merge(self, reason: str) -> Decision:
        return Decision("merge", reason, self._main)

    def _paper(self, family: _PaperFamily, spec: TensorSpec) -> Decision:
        """What the ACE paper's own runs did: every 2-D tensor but a few, as stored; the rest averaged."""
        if any(fnmatchcase(spec.name, pattern) for pattern in family.kept):
            return Decision("base", f"policy paper, {family.name}: not merged")
        if any(fnmatchcase(spec.name, pattern) for pattern in family.averaged):
            return Decision("merge", f"policy paper, {family.name}: averaged", self._average)
        if len(spec.shape) == 2:
            return self._merge(f"policy paper, {family.name}: 2-D")
        return Decision("merge", f"policy paper, {family.name}: not 2-D, averaged", self._average)


def _is_pointwise(spec: TensorSpec) -> bool:
    """Whether a convolution has a kernel of side one: a linear layer over channels."""
    return len(spec.shape) > 2 and all(side == 1 for side in spec.shape[2:])


def _is_of_patches(spec: TensorSpec, role: Role) -> bool:
    """Whether a tensor is a convolution that mixes channels, and so a linear layer of unfolded patches.

    A depthwise one is a filter for each channel, no matrix. Without an architecture it looks like one that reads a
    single channel, and is taken for depthwise.
    """
    if role.name != "convolution" or len(spec.shape) < 3 or spec.count == 0:
        return False
    channels = spec.shape[0] // role.groups if role.transposed else spec.shape[1]  # that one output is made of
    return channels > 1 or (role.groups == 1 and role.origin == "architecture")


@dataclass(frozen=True)
class _PaperFamily:
    """A model family of the paper's experiments; tensors whose name matches `kept` stay at the base, those of
    `averaged` get no rule.
    """

    name: str
    kept: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()


_PAPER_FAMILIES = (
    (("clip", "vit"), _PaperFamily("ViT", averaged=("*text_projection*",))),
    (("roberta",), _PaperFamily("RoBERTa", ("*classifier*", "*bias", "*LayerNorm*", "*embeddings*"))),
    (("gpt2",), _PaperFamily("GPT-2", ("*score*",))),
)
_PAPER_LANGUAGE_MODEL = _PaperFamily("language model", ("*embed_tokens*", "*lm_head*"))


def _paper_family(model_type: str, names: Collection[str]) -> _PaperFamily:
    for beginnings, family in _PAPER_FAMILIES:
        if model_type.startswith(beginnings):
            return family
    if any("embed_tokens" in name for name in names):
        return _PAPER_LANGUAGE_MODEL
    what = f"the paper has no run with model_type {model_type or 'unknown'!r}"
    raise UsageError("policy paper", what, "use policy default")
