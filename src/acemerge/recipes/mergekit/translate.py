"""A mergekit YAML to a recipe that gives what mergekit 0.1.5 gives.

Every parameter is worked out for every tensor, as mergekit resolves it: the model's own, then the common one, then
the default. Tensors that get the same share one rule of the recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import UsageError, nearest
from acemerge.models.depth import Layers
from acemerge.recipes.mergekit.models import (
    NOT_YET,
    MergekitMerge,
    check_keys,
    path_and_adapter,
    read_models,
    read_parameters,
)
from acemerge.recipes.mergekit.rules import RULES, MergekitMethod, MethodAndWeights, TensorParameters
from acemerge.recipes.mergekit.tokenizer import TOKENIZER_KEYS, read_tokenizer
from acemerge.recipes.mergekit.values import LayerPosition, ParameterValue, varies

KEYS = ("merge_method", "name", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", *TOKENIZER_KEYS)
_LATER = ("modules",)
_DTYPES = ("float32", "bfloat16", "float16")

# Model -> its tensors without their values; asked only where a value depends on them.
Headers = Callable[[str], Mapping[str, TensorSpec]]


_MOE_KEYS = ("gate_mode", "experts_per_token", "shared_experts", "source_model")


def is_mergekit(content: Mapping[str, Any], where: object) -> bool:
    """Whether a YAML is mergekit's: it says `merge_method`, which no recipe of ours does.

    UsageError for a file of mergekit-moe, which makes a mixture of experts and merges nothing.
    """
    experts = content.get("experts")
    listed = [expert for expert in experts if isinstance(expert, dict)] if isinstance(experts, list) else []
    moe = any(key in content for key in _MOE_KEYS) or any("source_model" in expert for expert in listed)
    if moe and "merge_method" not in content:
        what = "is a file of mergekit-moe, which puts models side by side as a mixture of experts"
        raise UsageError(where, what, "make it with mergekit-moe; acemerge merges models into one")
    return "merge_method" in content


def from_mergekit(
    content: Mapping[str, Any], where: object, locate: Callable[[str], str], headers: Headers
) -> dict[str, Any]:
    """The keys of our recipe.

    Raises UsageError for a key that mergekit does not know, one that it knows and we do not support, and a
    parameter that is missing, unknown or of no use.
    """
    check_keys(content, KEYS, where, _LATER)
    kind = _kind(content["merge_method"], where)
    common = read_parameters(content.get("parameters"), [*kind.per_model, *kind.shared], f"{where}: parameters")
    merged = read_models(content, kind, where)
    dtypes = [_dtype(content, key, where) for key in ("out_dtype", "dtype")]
    resolver = _Resolver(kind, common, merged, dtypes[1], str(where))
    rules = resolver.rules(lambda path: headers(locate(path_and_adapter(path)[0])))
    return {
        "method": rules[-1]["method"],
        "base": locate(path_and_adapter(merged.origin)[0]),
        "experts": [_expert(path, locate) for path in merged.experts],
        "slices": merged.slices,
        "rules": rules,
        **read_tokenizer(content, merged, where, locate),
        "dtype": next((dtype for dtype in dtypes if dtype), "auto"),
        "orientation": "stored",
    }


def _expert(path: str, locate: Callable[[str], str]) -> dict[str, Any]:
    model, adapter = path_and_adapter(path)
    return {"model": locate(model)} | ({} if adapter is None else {"adapter": locate(adapter)})


def _kind(name: Any, where: object) -> MergekitMethod:
    if name not in RULES:
        raise UsageError(where, f"merge_method {name!r} {NOT_YET}", nearest(str(name), list(RULES)))
    return RULES[name]


def _dtype(content: Mapping[str, Any], key: str, where: object) -> str | None:
    dtype = content.get(key)
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(where, f"`{key}: {dtype}` {NOT_YET}", f"use one of: {', '.join(_DTYPES)}")
    return dtype


@dataclass(frozen=True)
class _Resolver:
    """What each tensor gets."""

    kind: MergekitMethod
    common: Mapping[str, ParameterValue]
    merged: MergekitMerge
    dtype: str | None
    where: str

    def rules(self, headers: Headers) -> list[dict[str, Any]]:
        """The recipe's rules, the most common one last and for all that is left."""
        if not any(map(varies, self._parameters())) and not (self.kind.rounds and self.dtype is None):
            everywhere = [
                self._made(LayerPosition("", 0.0), group, self.dtype) for group in range(len(self.merged.groups))
            ]
            if all(made == everywhere[0] for made in everywhere):
                return [self._rule("*", everywhere[0])]
        stack = self.merged.stack
        specs = {name: spec for name, spec in self._tensors(headers).items() if spec.dtype.is_floating_point}
        places = LayerPosition.of_all(specs, stack)
        groups = {name: stack.slice_of(name)[0] if stack else 0 for name in specs}
        made = {name: self._made(places[name], groups[name], self._stored(specs[name])) for name in specs}
        return self._shared(made)

    def _parameters(self) -> Iterator[ParameterValue]:
        yield from self.common.values()
        for group in self.merged.groups:
            yield from group.parameters.values()
            for expert in group.experts:
                yield from expert.parameters.values()

    def _tensors(self, headers: Headers) -> Mapping[str, TensorSpec]:
        """The output's, with the types that their bases have."""
        stack = self.merged.stack
        if stack is None:
            return headers(self.merged.origin)
        bases = [group.base for group in self.merged.groups]
        found = {path: headers(path) for path in dict.fromkeys(base.path for base in bases)}
        parts = [Layers(found[base.path], base.layers[0]) for base in bases if base.layers]
        return {name: found[bases[i].path][there] for name, i, there in stack.names(parts)}

    def _stored(self, spec: TensorSpec) -> str:
        return self.dtype or str(spec.dtype).removeprefix("torch.")

    def _shared(self, made: Mapping[str, MethodAndWeights]) -> list[dict[str, Any]]:
        counts = Counter(repr(value) for value in made.values())
        most = max(counts, key=lambda key: counts[key])
        rest = next(value for value in made.values() if repr(value) == most)
        names = [name for name, value in made.items() if repr(value) != most]
        return [*(self._rule(_glob(name), made[name]) for name in names), self._rule("*", rest)]

    def _rule(self, match: str, made: MethodAndWeights) -> dict[str, Any]:
        method, weights = made
        return {"match": match, "method": dict(method)} | ({} if weights is None else {"weights": list(weights)})

    def _made(self, place: LayerPosition, number: int, dtype: str | None) -> MethodAndWeights:
        group, part = self.merged.groups[number], self.merged.parts[number]
        shared = {
            key: self._value(key, default, (group.parameters, self.common), f"{self.where}: parameters", place)
            for key, default in self.kind.shared.items()
        }
        each = {
            key: [
                self._value(key, default, (e.parameters, group.parameters, self.common), e.where or self.where, place)
                for e in group.experts
            ]
            for key, default in self.kind.per_model.items()
        }
        if not group.experts:  # the base alone
            return {"name": "average"}, None
        method, weights = self.kind.make(TensorParameters(shared, each, group.has_base, self.where))
        if self.kind.rounds and dtype in ("bfloat16", "float16"):
            method = {**method, "arithmetic": dtype}
        # Weights are for all experts: that of one which is no part of a slice counts nothing.
        own = None if weights is None else dict(zip(part, weights, strict=True))
        return method, None if own is None else [own.get(i, 1.0) for i in range(len(self.merged.experts))]

    def _value(
        self, key: str, default: Any, levels: Sequence[Mapping[str, ParameterValue]], where: str, place: LayerPosition
    ) -> Any:
        """The value on the first level that has one for this tensor."""
        for settings in levels:
            found = settings[key].at(place) if key in settings else None
            if found is not None:
                return found
        if default is ...:
            filtered = any(key in settings for settings in levels)
            tensor = f" for tensor {place.name!r}" if filtered else ""
            cure = "add one more entry with `value:` and no `filter:`" if filtered else "add it"
            raise UsageError(where, f"the parameter `{key}` is missing{tensor}", cure)
        return default


# A method's table for the recipe, and the experts' weights where they are not all one.


def _glob(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
