"""Merging what is in memory already: task vectors, state dicts, modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from acemerge.checkpoints.adapter import Adapter
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.wrappers import unwrapped
from acemerge.engine.batched import compute_all
from acemerge.engine.thresholds import with_thresholds
from acemerge.engine.work import Place, Result, Setting, Work
from acemerge.errors import CheckpointError, UsageError
from acemerge.linalg.lowrank import LowRank
from acemerge.methods import (
    Layer,
    LayerResult,
    LowRankResult,
    Method,
    check_experts,
    expert_seeds,
    make,
    merge_low_rank,
)
from acemerge.models.roles import Roles, roles_by_name, roles_from_model
from acemerge.planning.finite import is_finite
from acemerge.planning.jobs import Input, Piece, pieces
from acemerge.planning.planner import make_plan
from acemerge.recipes.recipe import make_recipe
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class _Memory:
    """A state dict as a source of tensors."""

    values: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None
    float8: str = ""
    absent: frozenset[str] = frozenset()

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in self.values.items()}


@dataclass(frozen=True)
class _PieceOf:
    """The values of one piece in the state dicts."""

    piece: Piece
    models: Sequence[Mapping[str, Tensor]]

    def take(self, wanted: Input) -> Tensor:
        model, name = wanted
        value = self.models[model][name].detach()
        return value if self.piece.rows is None else value[slice(*self.piece.rows)]

    def release(self, model: int) -> None:
        pass


def merge_deltas(
    deltas: Float[Tensor, "T *shape"],
    method: str = "ace",
    *,
    weights: Sequence[float] | None = None,
    base: Float[Tensor, "*shape"] | None = None,
    moments: Float[Tensor, "T *moment"] | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    **params: Any,
) -> LayerResult:
    """Merge the task vectors `D_t = W_t - W_0` of one layer, (T, out, in), by a rule with `params`.

    The work is done in `compute_dtype`: float64 for float64 input, else float32 unless given. `base` is `W_0`
    for the rules that merge weights (slerp, karcher); without it they merge the task vectors. `moments` are what the
    rules with data need: input second moments (T, in, in) for regmean, squared gradients (T, out, in) for fisher.
    `seed` is for the rules with chance. The input is never modified. Returns `.delta` (out, in), the rule's scale in
    it, and `.stats`.
    """
    if deltas.ndim < 2 or deltas.numel() == 0 or not deltas.dtype.is_floating_point:
        what = f"{deltas.dtype} of shape {list(deltas.shape)}"
        raise UsageError("deltas", what, "give floating-point task vectors of shape (T, out, in), T of 1 or more")
    rule = make(method, params)
    if rule.needs.matrix and deltas.ndim != 3:
        what = f"{method} needs matrices, not shape {list(deltas.shape[1:])}"
        raise UsageError("deltas", what, "give shape (T, out, in) or use an elementwise method")
    if base is not None and base.shape != deltas.shape[1:]:
        what = f"has shape {list(base.shape)}, the task vectors {list(deltas.shape[1:])}"
        raise UsageError("base", what, "give the layer that the task vectors start from")
    _check_moments(rule, deltas, moments)
    for where, values in (("deltas", deltas), ("base", base), ("moments", moments)):
        if values is not None:
            _check_finite(where, values)
    dtype = _compute_dtype(compute_dtype, [deltas])
    layer = _layer(rule, weights, len(deltas), seed, deltas.device)
    if base is not None:
        layer = replace(layer, base=base.detach().to(device=deltas.device, dtype=dtype))
    if moments is not None:
        layer = replace(layer, moments=moments.detach().to(device=deltas.device, dtype=dtype))
    return rule.merge(deltas.detach().to(dtype), layer)


def merge_factors(
    factors: Sequence[tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]],
    method: str = "ace",
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    **params: Any,
) -> LowRankResult:
    """Merge task vectors of low rank, `D_t = U_t V_t`, given as pairs `(U_t, V_t)` of (out, r_t) and (r_t, in).

    For LoRA U_t is `scaling * B` and V_t is `A`. The result is that of `merge_deltas` on the products; average,
    task_arithmetic, ace, ace_auto, anchored, kron, kron_auto, actmat, swudi_a, knots, core_space and the spectral rules
    do not form them where the ranks together are fewer than a side of the layer. For the others they are formed, and
    `stats["status"]` says so. Rules that merge weights merge the task vectors.

    Where two or more experts share the row space of V_t, as with a frozen A, the input side says nothing of the tasks:
    ace, actmat and the like then merge the transposes, and `stats["shared_input_side"]` is True.

    Returns `.left` (out, k) and `.right` (k, in), `.delta()` for their product, `.truncated(rank)` and `.stats`; where
    the products were formed, `.left` is (out, in) and `.right` is None. Other arguments as in `merge_deltas`.
    """
    rule = make(method, params)
    _check_factors(factors)
    if rule.needs.calibration:
        cure = "give the products of the factors to merge_deltas, with `moments`"
        raise UsageError(f"method {rule.name}", "needs what was measured on data", cure)
    dtype = _compute_dtype(compute_dtype, [factor for pair in factors for factor in pair])
    device = factors[0][0].device
    layer = _layer(rule, weights, len(factors), seed, device)
    left, right = (tuple(pair[side].detach().to(device, dtype) for pair in factors) for side in (0, 1))
    return merge_low_rank(rule, LowRank(left, right), layer, dtype)


def _check_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not factors:
        raise UsageError("factors", "there are none", "give a pair (U_t, V_t) for each expert")
    for t, (U, V) in enumerate(factors, 1):
        shapes = f"{list(U.shape)} and {list(V.shape)}"
        if U.ndim != 2 or V.ndim != 2 or U.shape[1] != V.shape[0] or not U.numel() or not V.numel():
            raise UsageError(f"factors {t}", f"shapes {shapes} have no product", "give (out, r) and (r, in)")
        if U.shape[0] != factors[0][0].shape[0] or V.shape[1] != factors[0][1].shape[1]:
            raise UsageError(f"factors {t}", f"shapes {shapes} are of another layer", "give updates of one layer")
        if not (U.dtype.is_floating_point and V.dtype.is_floating_point):
            raise UsageError(f"factors {t}", f"{U.dtype} and {V.dtype}", "give floating-point factors")
        for factor in (U, V):
            _check_finite(f"factors {t}", factor)


def _check_moments(rule: Method, deltas: Tensor, moments: Tensor | None) -> None:
    wanted = rule.needs.calibration
    if wanted is None and moments is None:
        return
    if wanted is None:
        raise UsageError("moments", f"{rule.name} does not use them", "leave them out")
    side = deltas.shape[-1]
    shape = deltas.shape if wanted == "gradients" else (len(deltas), side, side)
    what = "squared gradients" if wanted == "gradients" else "second moments of the layer's inputs"
    if moments is None:
        cure = "give them as `moments`, or merge folders with `calibration`"
        raise UsageError(f"method {rule.name}", f"needs {what} of each expert", cure)
    if moments.shape != shape:
        raise UsageError("moments", f"shape {list(moments.shape)}", f"give {what} of shape {list(shape)}")


def _check_finite(where: str, values: Tensor) -> None:
    if not is_finite(values):
        raise CheckpointError(where, "has values that are not finite", "mend the checkpoint they come from")


def _compute_dtype(asked: torch.dtype | None, given: Sequence[Tensor]) -> torch.dtype:
    dtype = asked or (torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise UsageError("compute_dtype", f"{dtype} is too narrow to add up in", "use torch.float32 or torch.float64")
    return dtype


def _layer(rule: Method, weights: Sequence[float] | None, experts: int, seed: int, device: torch.device) -> Layer:
    """What a rule may know of a layer that has no name, its weights checked."""
    factors = _checked_weights(weights, experts)
    check_experts(rule, factors)
    return Layer(torch.tensor(factors, dtype=torch.float64, device=device), expert_seeds(seed, "", range(experts)))


def _checked_weights(weights: Sequence[float] | None, experts: int) -> list[float]:
    factors = [1.0] * experts if weights is None else [float(weight) for weight in weights]
    if len(factors) != experts:
        raise UsageError("weights", f"{len(factors)} weights for {experts} experts", "give one weight each")
    if not all(math.isfinite(factor) for factor in factors):
        raise UsageError("weights", "not all are finite", "give finite numbers")
    return factors


def merge_state_dicts(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], method: str = "ace", **params: Any
) -> dict[str, Tensor]:
    """Merge state dicts in memory by the default policy, with roles told by names and shapes.

    Tensors that only experts have, and heads whose shapes differ, are not merged: the base's stay.
    """
    experts = [_without_wrapper(expert, base, i) for i, expert in enumerate(experts, 1)]
    return _merge_in_memory(base, experts, method, params, roles_by_name(_all_specs([base, *experts]), {}))


def merge_models(base: nn.Module, experts: Sequence[nn.Module], method: str = "ace", **params: Any) -> nn.Module:
    """A new module with the merged weights, roles asked of `base`'s own modules. The inputs are untouched.

    The modules' parameters are what is merged: fused experts in memory are one matrix to the rule where a
    checkpoint may hold their parts apart. Of a compiled or data-parallel model the module within is meant.
    """
    base, *experts = (unwrapped_module(m, f"expert {i}" if i else "base") for i, m in enumerate([base, *experts]))
    merged = copy.deepcopy(base)
    state = base.state_dict()
    tuned = [_without_wrapper(expert.state_dict(), state, i) for i, expert in enumerate(experts, 1)]
    roles = roles_from_model(base, _all_specs([state, *tuned]), type(base).__name__)
    values = _merge_in_memory(state, tuned, method, params, roles)
    merged.load_state_dict(values, strict=False)  # tied spellings are left out; they share their storage
    return merged


def unwrapped_module(module: nn.Module, who: str) -> nn.Module:
    """The model itself, without what compiles or copies it. UsageError where its weights are elsewhere."""
    while True:
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "PeftModel" in kinds:
            what = "is a PeftModel, whose adapter is not in its weights"
            raise UsageError(who, what, "give what its merge_and_unload() returns, or merge the adapter's folder")
        if kinds & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}:
            what = f"is a {type(module).__name__}, of whose weights each process has a part"
            raise UsageError(who, what, "save it whole, and merge the folder")
        inner = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
        found = next((inner[kind] for kind in kinds if kind in inner), None)
        if found is None:
            return module
        module = module.get_submodule(found)


def _without_wrapper(expert: Mapping[str, Tensor], base: Mapping[str, Tensor], number: int) -> Mapping[str, Tensor]:
    """An expert under the base's names. CheckpointError where its weights have an adapter beside them."""
    if any(".base_layer." in name or ".lora_A." in name for name in expert.keys() - base.keys()):
        cure = "give what peft's merge_and_unload() returns, or merge the adapter's folder"
        raise CheckpointError(f"expert {number}", "has the factors of a peft adapter beside its weights", cure)
    names = unwrapped(expert.keys(), base.keys()).names
    return {names.get(name, name): value for name, value in expert.items()} if names else expert


def _all_specs(states: Sequence[Mapping[str, Tensor]]) -> dict[str, TensorSpec]:
    """Every name in any of the state dicts, the first one's description where several have it."""
    return {name: spec for state in reversed(states) for name, spec in _Memory(state).tensors.items()}


def _merge_in_memory(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: str,
    params: Mapping[str, Any],
    roles: Roles,
) -> dict[str, Tensor]:
    labels = [str(i) for i in range(1, len(experts) + 1)]
    recipe = make_recipe({"base": "base", "experts": labels, "method": {"name": method, **params}}, "merge")
    sources = [_Memory(expert) for expert in experts]
    plan = make_plan(recipe, _Memory(base), sources, labels, roles)
    device = next((value.device for value in base.values()), torch.device("cpu"))
    models, place = [base, *experts], Place(device)

    def walk(parts: Iterable[Piece], work: Work[Result]) -> Generator[Result, None, None]:
        for piece in parts:
            yield work([(piece, _PieceOf(piece, models))], place)

    setting = with_thresholds(Setting(recipe, labels), plan, walk)
    merged = {}
    for job in plan.jobs:
        loaded = [(piece, _PieceOf(piece, models)) for piece in pieces(job, job.entrywise)]
        parts = [computed.value for computed in compute_all(loaded, setting, place)]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        merged[job.name] = value.to(base[job.name].device)
    return merged
