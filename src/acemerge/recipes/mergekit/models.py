"""Which models a mergekit YAML merges with each other: all of them, or those of each slice of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acemerge.errors import UsageError, nearest
from acemerge.models.depth import LayerStack
from acemerge.recipes.mergekit.rules import MergekitMethod
from acemerge.recipes.mergekit.values import ParameterValue

NOT_YET = "is not supported yet"


@dataclass(frozen=True)
class MergekitModel:
    """A model that takes part, its parameters, and its layers [first, end) where it is of a slice."""

    path: str
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    where: str = ""
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """Models that are merged with each other; `base` is what they start from, and `has_base` that the recipe says so.

    `parameters` are a slice's own.
    """

    base: MergekitModel
    experts: tuple[MergekitModel, ...]
    has_base: bool
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)


@dataclass(frozen=True)
class MergekitMerge:
    """The model that gives names and files, the experts by their paths, and their groups: one, or one a slice.

    `parts` are the experts of each group by their numbers.
    """

    origin: str
    experts: tuple[str, ...]
    groups: tuple[Group, ...]
    parts: tuple[tuple[int, ...], ...]
    sliced: bool = False

    @property
    def stack(self) -> LayerStack | None:
        """How many layers each slice has."""
        ranges = [group.base.layers for group in self.groups]
        return LayerStack(tuple(of[1] - of[0] for of in ranges if of)) if self.sliced else None

    @property
    def slices(self) -> list[dict[str, Any]]:
        """The slices as our recipe has them."""
        return [self._slice(group, part) for group, part in zip(self.groups, self.parts, strict=True) if self.sliced]

    def _slice(self, group: Group, part: Sequence[int]) -> dict[str, Any]:
        ranges: list[Any] = [None] * len(self.experts)
        for i, expert in zip(part, group.experts, strict=True):
            ranges[i] = expert.layers
        return {"base": group.base.layers, "base_from": self.number(group.base.path), "experts": ranges}

    def number(self, path: str) -> int:
        """0 for the base and i + 1 for the i-th expert."""
        return 0 if path == self.origin else 1 + self.experts.index(path)


def read_models(content: Mapping[str, Any], kind: MergekitMethod, where: object) -> MergekitMerge:
    """The models under `models` or `slices`.

    Raises UsageError for a key that is not known, a model without a path, and too few or too many of them.
    """
    if content.get("slices") is None:
        return _whole(content, kind, where)
    if content.get("models") is not None:
        raise UsageError(where, "has both `models` and `slices`", "keep one of the two")
    return _sliced(content, kind, where)


def _whole(content: Mapping[str, Any], kind: MergekitMethod, where: object) -> MergekitMerge:
    given = content.get("base_model")
    if given is None and kind.base == "required":
        raise UsageError(where, f"{content['merge_method']} needs a `base_model`", "add it")
    models = _models(content.get("models"), "models", kind, where)
    base = MergekitModel(models[0].path if given is None else _path(given, str(where), "base_model"))
    has_base = kind.base != "ignored" and given is not None
    experts = models
    if kind.base == "ignored" and all(model.path != base.path for model in models):
        experts = [*models, base]  # one more of those that are merged
    if has_base:
        others = [model for model in models if model.path != base.path]
        experts = [base, *others] if kind.counts_base else others
    _check_count(experts, kind, content["merge_method"], has_base, where)
    _check_base(base, has_base, kind, where)
    group = Group(base, tuple(experts), has_base)
    return MergekitMerge(base.path, tuple(e.path for e in experts), (group,), (tuple(range(len(experts))),))


def _sliced(content: Mapping[str, Any], kind: MergekitMethod, where: object) -> MergekitMerge:
    entries = content["slices"]
    if not isinstance(entries, list) or not entries:
        raise UsageError(where, "`slices` is no list", "list them: `slices: [{sources: [...]}, ...]`")
    groups = [_slice(entry, content, kind, f"{where}: slices.{i}") for i, entry in enumerate(entries)]
    given = content.get("base_model")
    origin = groups[0].base.path if given is None else _path(given, str(where), "base_model")
    # Experts, and after them models that others start from and that are neither.
    paths = [expert.path for group in groups for expert in group.experts]
    paths += [group.base.path for group in groups if group.base.path != origin]
    experts = tuple(dict.fromkeys(paths)) or (origin,)
    parts = tuple(tuple(experts.index(expert.path) for expert in group.experts) for group in groups)
    return MergekitMerge(origin, experts, tuple(groups), parts, sliced=True)


def _slice(entry: Any, content: Mapping[str, Any], kind: MergekitMethod, where: str) -> Group:
    if not isinstance(entry, dict):
        raise UsageError(where, "not a table of keys", "write `- sources: [...]`")
    check_keys(entry, ("sources", "base_model", "parameters"), where, ("residual_weight",))
    models = _models(entry.get("sources"), "sources", kind, where)
    for model in models:
        if [other.path for other in models].count(model.path) > 1:
            raise UsageError(where, f"model {model.path!r} is there twice", "name it once a slice")
    lengths = {layers[1] - layers[0] for model in models if (layers := model.layers)}
    if len(lengths) > 1:
        raise UsageError(where, f"its sources have {sorted(lengths)} layers", "give ranges of one length")
    parameters = read_parameters(entry.get("parameters"), [*kind.per_model, *kind.shared], f"{where}.parameters")
    given = entry.get("base_model", content.get("base_model"))
    if kind.base == "ignored" or (given is None and kind.base == "optional"):
        first = next((model for model in models if model.path == given), models[0])
        return Group(first, _counted(models, kind, content, False, where), False, parameters)
    if given is None:
        raise UsageError(where, f"{content['merge_method']} needs a `base_model`", "add it")
    path = _path(given, where, "base_model")
    base = next((model for model in models if model.path == path), None)
    if base is None:
        raise UsageError(where, f"its base {path!r} is none of its sources", "add it with its `layer_range`")
    others = [model for model in models if model is not base]
    experts = [base, *others] if kind.counts_base else others
    _check_base(base, True, kind, where)
    return Group(base, _counted(experts, kind, content, True, where), True, parameters)


def _counted(
    experts: Sequence[MergekitModel], kind: MergekitMethod, content: Mapping[str, Any], has_base: bool, where: str
) -> tuple[MergekitModel, ...]:
    # The base alone is itself, where a method takes any number.
    if experts or kind.experts[0] > 1:
        _check_count(experts, kind, content["merge_method"], has_base, where)
    return tuple(experts)


def _check_count(
    experts: Sequence[MergekitModel], kind: MergekitMethod, method: str, has_base: bool, where: object
) -> None:
    least, most = kind.experts
    if least <= len(experts) <= most:
        return
    number = f"{least} model{'s' if least > 1 else ''}" if least == most else f"at least {least} models"
    beside = ", the base among them" if kind.counts_base else " beside the base" if has_base else ""
    key = "models" if experts[:1] and experts[0].layers is None else "sources"
    raise UsageError(where, f"{method} merges {number}{beside}, not {len(experts)}", f"list as many under `{key}:`")


def _models(entries: Any, key: str, kind: MergekitMethod, where: object) -> list[MergekitModel]:
    if not isinstance(entries, list) or not entries:
        raise UsageError(where, f"`{key}` is missing or no list", f"list the models: `{key}: [{{model: PATH}}, ...]`")
    known = ("model", "layer_range", "parameters") if key == "sources" else ("model", "parameters")
    models = []
    for i, entry in enumerate(entries):
        place = f"{where}{'.' if key == 'sources' else ': '}{key}.{i}"
        if not isinstance(entry, dict):
            raise UsageError(place, "not a table of keys", "write `- model: PATH`")
        check_keys(entry, known, place)
        layers = _layer_range(entry.get("layer_range"), place) if key == "sources" else None
        settings = read_parameters(entry.get("parameters"), list(kind.per_model), place)
        models.append(MergekitModel(_path(entry.get("model"), place), settings, place, layers))
    return models


_RANGE = "write the first layer and the one behind the last, as `layer_range: [0, 8]`"


def _layer_range(value: Any, where: str) -> tuple[int, int]:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    if not numbers or not 0 <= value[0] < value[1]:
        raise UsageError(where, f"`layer_range` is {value!r:.60}", _RANGE)
    return value[0], value[1]


def _path(model: Any, where: str, key: str = "model") -> str:
    if not isinstance(model, str) or not model:
        raise UsageError(where, f"`{key}` is not one path", f"write `{key}: PATH`")
    if model.count("+") > 1 or "" in model.split("+"):
        raise UsageError(where, f"{model!r} is no `PATH` nor `PATH+LORA`", "name one adapter")
    return model


def path_and_adapter(model: str) -> tuple[str, str | None]:
    """The model's own path, and that of the adapter which is applied to it."""
    path, _, adapter = model.partition("+")
    return path, adapter or None


def _check_base(base: MergekitModel, has_base: bool, kind: MergekitMethod, where: object) -> None:
    """UsageError for a base with an adapter where it must be what the others start from."""
    if has_base and not kind.counts_base and path_and_adapter(base.path)[1]:
        what = f"an adapter on the base, as in {base.path!r}, {NOT_YET}"
        raise UsageError(where, what, "merge it into its model first by --method average, and name that folder")


def check_keys(table: Mapping[str, Any], known: Sequence[str], where: object, later: Sequence[str] = ()) -> None:
    """UsageError for the first key that is not known; `later` are mergekit's own that we do not have."""
    for key in table:
        if key in later and table[key] is not None:
            raise UsageError(where, f"`{key}` {NOT_YET}", "take it out, or merge with mergekit")
        if key not in known and key not in later:
            choices = [*known, *later]
            cure = (
                nearest(str(key), choices)
                if choices
                else "a model has no parameters here: write it under the recipe's `parameters`"
            )
            raise UsageError(where, f"unknown key {key!r}", cure)


def read_parameters(table: Any, known: Sequence[str], where: str) -> dict[str, ParameterValue]:
    """A table of parameters, none where there is none."""
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise UsageError(where, "not a table of keys", "write for example `parameters: {weight: 0.5}`")
    check_keys(table, known, where)
    return {key: ParameterValue.read(value, f"{where}.{key}") for key, value in table.items() if value is not None}
