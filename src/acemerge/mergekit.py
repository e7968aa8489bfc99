"""A mergekit YAML to a recipe that gives what mergekit 0.1.5 gives.

Every parameter is worked out for every tensor, as mergekit resolves it: the model's own, then the common one, then
the default. Tensors that get the same share one rule of the recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import UsageError, nearest
from acemerge.mergekit_rules import RULES, Kind, Values
from acemerge.mergekit_settings import Place, Setting, varies

_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")
_DTYPES = ("float32", "bfloat16", "float16")
_NOT_YET = "is not supported yet"

# Model -> its tensors without their values; asked only where a value depends on them.
Headers = Callable[[str], Mapping[str, TensorSpec]]


@dataclass(frozen=True)
class _Model:
    path: str
    parameters: Mapping[str, Setting]
    where: str


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Whether a YAML is mergekit's: it says `merge_method`, which no recipe of ours does."""
    return "merge_method" in content


def from_mergekit(
    content: Mapping[str, Any], where: object, locate: Callable[[str], str], headers: Headers
) -> dict[str, Any]:
    """The keys of our recipe.

    Raises UsageError for a key that mergekit does not know, one that it knows and we do not support, and a
    parameter that is missing, unknown or of no use.
    """
    _check_keys(content, _KEYS, where, _LATER)
    kind = _kind(content["merge_method"], where)
    common = _settings(content.get("parameters"), [*kind.per_model, *kind.shared], f"{where}: parameters")
    models = _models(content.get("models"), list(kind.per_model), where)
    base, experts = _roles(content, kind, models, where, locate)
    dtypes = [_dtype(content, key, where) for key in ("out_dtype", "dtype")]
    has_base = kind.base != "ignored" and content.get("base_model") is not None
    resolver = _Resolver(kind, has_base, common, experts, dtypes[1], str(where))
    rules = resolver.rules(lambda: headers(base))
    return {
        "method": rules[-1]["method"],
        "base": base,
        "experts": [{"model": expert.path} for expert in experts],
        "rules": rules,
        "dtype": next((dtype for dtype in dtypes if dtype), "auto"),
        "orientation": "stored",
    }


def _kind(name: Any, where: object) -> Kind:
    if name not in RULES:
        raise UsageError(where, f"merge_method {name!r} {_NOT_YET}", nearest(str(name), list(RULES)))
    return RULES[name]


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: object, later: Sequence[str] = ()) -> None:
    """UsageError for the first key that is not known; `later` are mergekit's own that we do not have."""
    for key in table:
        if key in later and table[key] is not None:
            raise UsageError(where, f"`{key}` {_NOT_YET}", "take it out, or merge with mergekit")
        if key not in known and key not in later:
            raise UsageError(where, f"unknown key {key!r}", nearest(str(key), [*known, *later]))


def _settings(table: Any, known: Sequence[str], where: str) -> dict[str, Setting]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise UsageError(where, "not a table of keys", "write for example `parameters: {weight: 0.5}`")
    _check_keys(table, known, where)
    return {key: Setting.read(value, f"{where}.{key}") for key, value in table.items() if value is not None}


def _models(entries: Any, known: Sequence[str], where: object) -> list[_Model]:
    if not isinstance(entries, list) or not entries:
        raise UsageError(where, "`models` is missing or no list", "list the models: `models: [{model: PATH}, ...]`")
    models = []
    for i, entry in enumerate(entries):
        place = f"{where}: models.{i}"
        if not isinstance(entry, dict):
            raise UsageError(place, "not a table of keys", "write `- model: PATH`")
        _check_keys(entry, ("model", "parameters"), place)
        models.append(_Model(_path(entry.get("model"), place), _settings(entry.get("parameters"), known, place), place))
    return models


def _path(model: Any, where: str) -> str:
    if not isinstance(model, str) or not model:
        raise UsageError(where, "`model` is not one path", "write `model: PATH`")
    if "+" in model:
        raise UsageError(where, f"`PATH+LORA`, as in {model!r}, {_NOT_YET}", "merge the adapter into its model first")
    return model


def _dtype(content: Mapping[str, Any], key: str, where: object) -> str | None:
    dtype = content.get(key)
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(where, f"`{key}: {dtype}` {_NOT_YET}", f"use one of: {', '.join(_DTYPES)}")
    return dtype


def _roles(
    content: Mapping[str, Any], kind: Kind, models: list[_Model], where: object, locate: Callable[[str], str]
) -> tuple[str, list[_Model]]:
    """The model that gives names and files, and the experts, all by their paths."""
    base = content.get("base_model")
    if base is None and kind.base == "required":
        raise UsageError(where, f"{content['merge_method']} needs a `base_model`", "add it")
    origin = _path(models[0].path if base is None else base, f"{where}: base_model")
    if kind.base != "ignored" and base is not None:
        others = [model for model in models if model.path != origin]
        models = [_Model(origin, {}, ""), *others] if kind.counts_base else others
    least, most = kind.experts
    if not least <= len(models) <= most:
        number = f"{least}" if least == most else f"at least {least}"
        what = f"{content['merge_method']} merges {number} models beside the base, not {len(models)}"
        if kind.counts_base or base is None or kind.base == "ignored":
            what = f"{content['merge_method']} merges {number} models, not {len(models)}"
        raise UsageError(where, what, "change `models`")
    return locate(origin), [_Model(locate(model.path), model.parameters, model.where) for model in models]


@dataclass(frozen=True)
class _Resolver:
    """What each tensor gets."""

    kind: Kind
    has_base: bool
    common: Mapping[str, Setting]
    experts: Sequence[_Model]
    dtype: str | None
    where: str

    def rules(self, tensors: Callable[[], Mapping[str, TensorSpec]]) -> list[dict[str, Any]]:
        """The recipe's rules, the most common one last and for all that is left."""
        settings = [*self.common.values(), *(s for expert in self.experts for s in expert.parameters.values())]
        if not any(varies(setting) for setting in settings) and not (self.kind.rounds and self.dtype is None):
            return [self._rule("*", self._made(Place("", 0.0), self.dtype))]
        specs = {name: spec for name, spec in tensors().items() if spec.dtype.is_floating_point}
        places = Place.of_all(specs)
        made = {name: self._made(places[name], self._stored(specs[name])) for name in specs}
        return self._shared(made)

    def _stored(self, spec: TensorSpec) -> str:
        return self.dtype or str(spec.dtype).removeprefix("torch.")

    def _shared(self, made: Mapping[str, Made]) -> list[dict[str, Any]]:
        counts = Counter(repr(value) for value in made.values())
        most = max(counts, key=lambda key: counts[key])
        rest = next(value for value in made.values() if repr(value) == most)
        names = [name for name, value in made.items() if repr(value) != most]
        return [*(self._rule(_glob(name), made[name]) for name in names), self._rule("*", rest)]

    def _rule(self, match: str, made: Made) -> dict[str, Any]:
        method, weights = made
        return {"match": match, "method": dict(method)} | ({} if weights is None else {"weights": list(weights)})

    def _made(self, place: Place, dtype: str | None) -> Made:
        shared = {key: self._shared_value(key, default, place) for key, default in self.kind.shared.items()}
        each = {
            key: [self._value(key, default, expert, place) for expert in self.experts]
            for key, default in self.kind.per_model.items()
        }
        method, weights = self.kind.make(Values(shared, each, self.has_base, self.where))
        if self.kind.rounds and dtype in ("bfloat16", "float16"):
            method = {**method, "arithmetic": dtype}
        return method, weights

    def _shared_value(self, key: str, default: Any, place: Place) -> Any:
        found = self.common[key].at(place) if key in self.common else None
        return self._or_default(found, default, key, f"{self.where}: parameters", place)

    def _value(self, key: str, default: Any, expert: _Model, place: Place) -> Any:
        for settings in (expert.parameters, self.common):
            found = settings[key].at(place) if key in settings else None
            if found is not None:
                return found
        return self._or_default(None, default, key, expert.where or self.where, place)

    def _or_default(self, found: Any, default: Any, key: str, where: str, place: Place) -> Any:
        if found is None and default is ...:
            tensor = f" for tensor {place.name!r}" if place.name else ""
            raise UsageError(where, f"the parameter `{key}` is missing{tensor}", "add it")
        return default if found is None else found


# A method's table for the recipe, and the experts' weights where they are not all one.
Made = tuple[Mapping[str, Any], Sequence[float] | None]


def _glob(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
