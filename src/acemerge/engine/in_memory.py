"""Merging what is in memory already: state dicts, modules."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import nn

from acemerge.checkpoints.adapter import Adapter
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.wrappers import unwrapped
from acemerge.engine.batched import compute_all
from acemerge.engine.compute import whole_record
from acemerge.engine.thresholds import counting, with_thresholds
from acemerge.engine.work import Place, Result, Setting, Work
from acemerge.errors import AcemergeError, CheckpointError, UsageError
from acemerge.linalg.device import with_host
from acemerge.methods import AnyMethod
from acemerge.methods.registry import check_names
from acemerge.models.roles import Roles, roles_by_name, roles_from_model
from acemerge.output.manifest import build_manifest
from acemerge.output.merge_report import MergeReport
from acemerge.planning.jobs import AnyJob, Input, Job
from acemerge.planning.pieces import Piece, pieces
from acemerge.planning.planner import make_plan
from acemerge.recipes.recipe import Recipe, make_recipe, with_params, with_weights
from acemerge.shapes import Tensor


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

    piece: Piece[Job]
    models: Sequence[Mapping[str, Tensor]]

    def take(self, wanted: Input) -> Tensor:
        model, name = wanted
        value = self.models[model][name].detach()
        return value if self.piece.rows is None else value[slice(*self.piece.rows)]

    def release(self, model: int) -> None:
        pass


@overload
def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: AnyMethod = ...,
    *,
    report: Literal[False] = ...,
    **options: Any,
) -> dict[str, Tensor]: ...
@overload
def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: AnyMethod = ...,
    *,
    report: Literal[True],
    **options: Any,
) -> tuple[dict[str, Tensor], MergeReport]: ...
def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: AnyMethod = "auto",
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rules: Sequence[Mapping[str, Any]] = (),
    embeddings: Literal["average", "rule", "base"] | None = None,
    convolutions: Literal["average", "rule"] | None = None,
    compute_dtype: torch.dtype | str | None = None,
    report: bool = False,
    **params: Any,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], MergeReport]:
    """Merge state dicts in memory by the default policy, with roles told by names and shapes.

    `method` is a rule's name, a table with `name` and its parameters, or an instance of a rule; `params` are its
    parameters. `rules` say what tensors get whose name matches, `embeddings` and `convolutions` what these get, as in a
    recipe; convolutions are taken to have one group, or as many as channels, where each output has one of
    them. Tensors that only experts have, and heads whose shapes differ, are not merged: the base's stay. With `report`
    the result is the merged state dict and what was done of every tensor.
    """
    kinds = {"embeddings": embeddings, "convolutions": convolutions}
    asked = _asked(experts, method, weights, seed, rules, kinds, compute_dtype, params)
    experts = [_without_wrapper(expert, base, i) for i, expert in enumerate(experts, 1)]
    merged, done = _merge_in_memory(base, experts, asked, roles_by_name(_all_specs([base, *experts]), {}))
    return (merged, done) if report else merged


@overload
def merge_models(
    base: nn.Module,
    experts: Sequence[nn.Module],
    method: AnyMethod = ...,
    *,
    report: Literal[False] = ...,
    **options: Any,
) -> nn.Module: ...
@overload
def merge_models(
    base: nn.Module, experts: Sequence[nn.Module], method: AnyMethod = ..., *, report: Literal[True], **options: Any
) -> tuple[nn.Module, MergeReport]: ...
def merge_models(
    base: nn.Module,
    experts: Sequence[nn.Module],
    method: AnyMethod = "auto",
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rules: Sequence[Mapping[str, Any]] = (),
    embeddings: Literal["average", "rule", "base"] | None = None,
    convolutions: Literal["average", "rule"] | None = None,
    compute_dtype: torch.dtype | str | None = None,
    report: bool = False,
    **params: Any,
) -> nn.Module | tuple[nn.Module, MergeReport]:
    """A new module with the merged weights, roles asked of `base`'s own modules. The inputs are untouched.

    The modules' parameters are what is merged: fused experts in memory are one matrix to the rule where a
    checkpoint may hold their parts apart. Of a compiled or data-parallel model the module within is meant. Arguments as
    of `merge_state_dicts`.
    """
    kinds = {"embeddings": embeddings, "convolutions": convolutions}
    asked = _asked(experts, method, weights, seed, rules, kinds, compute_dtype, params)
    base, *experts = (unwrapped_module(m, f"expert {i}" if i else "base") for i, m in enumerate([base, *experts]))
    merged = copy.deepcopy(base)
    state = base.state_dict()
    tuned = [_without_wrapper(expert.state_dict(), state, i) for i, expert in enumerate(experts, 1)]
    roles = roles_from_model(base, _all_specs([state, *tuned]), type(base).__name__)
    values, done = _merge_in_memory(state, tuned, asked, roles)
    merged.load_state_dict(values, strict=False)  # tied spellings are left out; they share their storage
    return (merged, done) if report else merged


def _asked(
    experts: Sequence[object],
    method: AnyMethod,
    weights: Sequence[float] | None,
    seed: int,
    rules: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, str | None],
    compute_dtype: torch.dtype | str | None,
    params: Mapping[str, Any],
) -> Recipe:
    """The recipe of a merge of models that have no names but their numbers. `kinds`: what some tensors get.

    UsageError for a rule that wants data.
    """
    check_names(method, params, ["weights", "seed", "rules", *kinds, "compute_dtype", "report"])
    named = with_weights([str(i) for i in range(1, len(experts) + 1)], weights)
    content: dict[str, Any] = {"base": "base", "experts": named, "method": with_params(method, params), "seed": seed}
    content |= {key: value for key, value in kinds.items() if value is not None}
    if compute_dtype is not None:
        content["compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    content |= {"rules": [dict(rule) for rule in rules], "calibration": "of folders only"}
    recipe = make_recipe(content, "merge").model_copy(update={"calibration": None})
    built = (recipe.build_method(), *(rule.method.build() for rule in recipe.rules if rule.method))
    for rule in built:
        if rule.needs.calibration:
            cure = "merge their folders with `calibration`, or layers by merge_deltas with `moments`"
            raise UsageError(f"method {rule.name}", "needs data, by which no model in memory is measured", cure)
    return recipe


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
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], recipe: Recipe, roles: Roles
) -> tuple[dict[str, Tensor], MergeReport]:
    device = next((value.device for value in base.values()), torch.device("cpu"))
    try:
        with with_host(device):
            return _merged_on(device, base, experts, recipe, roles)
    except AcemergeError as failure:
        raise failure.in_memory from failure


def _merged_on(
    device: torch.device,
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
    roles: Roles,
) -> tuple[dict[str, Tensor], MergeReport]:
    started = time.perf_counter()
    labels = recipe.models[1:]
    plan = make_plan(recipe, _Memory(base), [_Memory(expert) for expert in experts], labels, roles)
    models, place = [base, *experts], Place(device)

    def walk(parts: Iterable[Piece[AnyJob]], work: Work[AnyJob, Result]) -> Generator[Result, None, None]:
        for piece in parts:
            yield work([(piece, _PieceOf(piece, models))], place)

    setting = Setting(recipe, labels)
    setting = with_thresholds(setting, plan, counting(setting, walk))
    merged, records = {}, {}
    for job in plan.jobs:
        loaded = [(piece, _PieceOf(piece, models)) for piece in pieces(job, job.entrywise)]
        parts = compute_all(loaded, setting, place)
        value = torch.cat([part.value for part in parts]) if len(parts) > 1 else parts[0].value
        merged[job.name] = value.to(base[job.name].device)
        records[job.name] = whole_record([part.record for part in parts])
    seconds = round(time.perf_counter() - started, 3)
    return merged, MergeReport(None, build_manifest(plan, records, [], {}, seconds))
