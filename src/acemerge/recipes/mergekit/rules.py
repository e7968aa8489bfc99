"""mergekit's merge methods: their parameters with its defaults, and the rule of ours that gives the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from acemerge.errors import UsageError

_NEEDED = ...  # has no default
_MANY = 10_000
MethodAndWeights = tuple[Mapping[str, Any], Sequence[float] | None]  # the table of our method, and the experts' weights


@dataclass(frozen=True)
class TensorParameters:
    """The parameters of one tensor: those of the method, and those of each model."""

    shared: Mapping[str, Any]
    each: Mapping[str, Sequence[Any]]
    has_base: bool
    where: str

    def flag(self, key: str) -> bool:
        value = self.shared[key]
        if value not in (True, False):
            raise UsageError(self.where, f"`{key}` is {value!r}", "write true or false")
        return bool(value)

    def one_or_each(self, key: str) -> Any:
        """One number where all models have the same."""
        values = self.each[key]
        return values[0] if len(set(values)) == 1 else tuple(values)


@dataclass(frozen=True)
class MergekitMethod:
    """A merge method of mergekit.

    `per_model` and `shared` are its parameters with their defaults. `base` says what a `base_model` is to it,
    `counts_base` that it is one of the models that are merged, `experts` how many it merges. `rounds`: our rule
    can compute in the models' type as mergekit does. `make` gives the table of our method
    and the experts' weights.
    """

    per_model: Mapping[str, Any]
    shared: Mapping[str, Any]
    base: Literal["required", "optional", "ignored"]
    make: Callable[[TensorParameters], MethodAndWeights]
    experts: tuple[int, int] = (1, _MANY)
    counts_base: bool = False
    rounds: bool = False


def _linear(values: TensorParameters) -> MethodAndWeights:
    weights = values.each["weight"]
    if not values.flag("normalize"):
        return {"name": "mergekit_linear"}, weights
    if sum(weights) == 0:
        raise UsageError(values.where, "the weights sum to zero", "change them, or set `normalize: false`")
    return {"name": "average"}, weights


def _passthrough(values: TensorParameters) -> MethodAndWeights:
    return {"name": "mergekit_linear"}, values.each["scale"]


def _slerp(values: TensorParameters) -> MethodAndWeights:
    t = values.shared["t"]
    return {"name": "mergekit_slerp"}, (1 - t, t)


def _nuslerp(values: TensorParameters) -> MethodAndWeights:
    # mergekit's names for the two are the other way round.
    by = "columns" if values.flag("nuslerp_row_wise") else "rows"
    along = "tensor" if values.flag("nuslerp_flatten") else by
    of = "updates" if values.has_base else "weights"
    return {"name": "mergekit_slerp", "of": of, "along": along, "straight": 1.0}, values.each["weight"]


def _multislerp(values: TensorParameters) -> MethodAndWeights:
    of, normalize = "updates" if values.has_base else "weights", values.flag("normalize_weights")
    weights = values.each["weight"]
    if normalize and sum(weights) == 0:
        raise UsageError(values.where, "the weights sum to zero", "change them, or set `normalize_weights: false`")
    return {"name": "mergekit_multislerp", "of": of, "normalize": normalize, "eps": values.shared["eps"]}, weights


def _nearswap(values: TensorParameters) -> MethodAndWeights:
    return {"name": "mergekit_nearswap", "t": max(0, values.shared["t"])}, None


def _ram(values: TensorParameters) -> MethodAndWeights:
    return {"name": "mergekit_ram", **values.shared}, None


def _model_stock(values: TensorParameters) -> MethodAndWeights:
    if values.flag("filter_wise"):
        raise UsageError(values.where, "`filter_wise: true` is not supported yet", "take it out")
    return {"name": "model_stock", "still": "count"}, None


def _karcher(values: TensorParameters) -> MethodAndWeights:
    return {"name": "karcher", "steps": values.shared["max_iter"], "tol": values.shared["tol"]}, None


def _sce(values: TensorParameters) -> MethodAndWeights:
    return {"name": "mergekit_sce", "select": values.shared["select_topk"]}, None


def _fusion(values: TensorParameters) -> MethodAndWeights:
    return {"name": "arcee_fusion"}, None


def _sum(
    trim: str, vote: bool = False, normalize: bool = False, rescale: bool = False, extra: str = ""
) -> MergekitMethod:
    """A member of the family of task arithmetic, with its defaults; `extra` is the parameter that its trimming has."""

    def make(values: TensorParameters) -> MethodAndWeights:
        own = ("density", *([extra] if extra else [])) if trim != "none" else ()
        method = {"name": "mergekit_sum", "trim": trim, "vote": vote, "normalize": values.flag("normalize")}
        method |= {key: values.one_or_each(key) for key in own}
        return {**method, "rescale": values.flag("rescale"), "scale": values.shared["lambda"]}, values.each["weight"]

    per_model = {"weight": _NEEDED, "density": 1.0} | ({extra: _DEFAULTS[extra]} if extra else {})
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    return MergekitMethod(per_model, shared, "required", make, rounds=True)


_DEFAULTS = {"gamma": 0.01, "epsilon": 0.15}
_NUSLERP = {"nuslerp_flatten": True, "nuslerp_row_wise": False}

RULES: dict[str, MergekitMethod] = {
    "linear": MergekitMethod({"weight": _NEEDED}, {"normalize": True}, "ignored", _linear),
    "slerp": MergekitMethod({}, {"t": _NEEDED}, "required", _slerp, experts=(2, 2), counts_base=True),
    "nuslerp": MergekitMethod({"weight": _NEEDED}, _NUSLERP, "optional", _nuslerp, experts=(2, 2)),
    "multislerp": MergekitMethod(
        {"weight": _NEEDED}, {"normalize_weights": True, "eps": 1e-8}, "optional", _multislerp
    ),
    "nearswap": MergekitMethod({}, {"t": _NEEDED}, "required", _nearswap, experts=(1, 1)),
    "ram": MergekitMethod({}, {"epsilon": 1e-5}, "required", _ram),
    "ramplus_tl": MergekitMethod({}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, "required", _ram),
    "task_arithmetic": _sum("none"),
    "ties": _sum("largest", vote=True, normalize=True),
    "dare_linear": _sum("random", rescale=True),
    "dare_ties": _sum("random", vote=True, rescale=True),
    "della": _sum("by_rank", vote=True, normalize=True, rescale=True, extra="epsilon"),
    "della_linear": _sum("by_rank", rescale=True, extra="epsilon"),
    "breadcrumbs": _sum("middle", extra="gamma"),
    "breadcrumbs_ties": _sum("middle", vote=True, extra="gamma"),
    "sce": MergekitMethod({}, {"select_topk": 1.0, "int8_mask": False}, "required", _sce),
    "model_stock": MergekitMethod({}, {"filter_wise": False}, "required", _model_stock, experts=(2, _MANY)),
    "arcee_fusion": MergekitMethod({}, {}, "required", _fusion, experts=(1, 1)),
    "karcher": MergekitMethod({}, {"max_iter": 10, "tol": 1e-5}, "ignored", _karcher),
    "passthrough": MergekitMethod({"scale": 1.0}, {}, "ignored", _passthrough, experts=(1, 1)),
}
