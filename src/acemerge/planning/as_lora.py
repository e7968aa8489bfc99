"""An output that is a LoRA adapter: which tensors it can hold, their factors, and what of the merge it lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from acemerge.checkpoints.assets import in_module
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.lora import PREFIX
from acemerge.errors import CheckpointError, UsageError
from acemerge.linalg.gram import energies
from acemerge.methods import LayerStats, LowRankResult
from acemerge.methods.compressed import looks_at_updates_alone
from acemerge.methods.factors import nearest_factors
from acemerge.models.fused_experts import expert_number
from acemerge.models.lora_targets import task_type
from acemerge.models.roles import Roles, role_by_name
from acemerge.planning.finite import rounded
from acemerge.planning.jobs import OUTPUT_DTYPES, Merge, Plan
from acemerge.shapes import Tensor


def as_adapter(plan: Plan, roles: Roles, rank: int) -> Plan:
    """The plan where the output is an adapter of this rank, with factors A and B of every linear layer.

    Other tensors that are merged stay in the plan, with no factors: what changes of them is lost. Raises UsageError for
    a rule that writes more than a model, CheckpointError where no layer is left.
    """
    masked = next((job.rule for job in plan.merged if job.makes_masks), None)
    if masked:
        raise UsageError(
            "--as-lora", f"{masked} writes masks beside a model", "use another rule, or leave --as-lora out"
        )
    modules = {job.name: _module(job, roles) for job in plan.merged}
    if any(job.role.transposed for job in plan.merged if modules[job.name]):  # PEFT turns all layers, or no parameter
        by_module = {name for name, how in roles.lora_targets.items() if how == "module"}
        modules = {name: module if f"{module}.weight" in by_module else "" for name, module in modules.items()}
    if not any(modules.values()):
        what = "has no linear layer that the experts change and an adapter could hold"
        raise CheckpointError(plan.recipe.base, what, "leave --as-lora out")
    dtype = OUTPUT_DTYPES.get(plan.recipe.dtype, torch.float32)
    jobs = []
    for job in plan.merged:
        if modules[job.name]:
            if plan.recipe.compress == "first":
                job = replace(job, compressed=True)
                _check_compressible(job)
            jobs.append(replace(job, factors=_specs(job, modules[job.name], rank, dtype), entrywise=False))
        else:
            layer = job.role.name in ("linear", "conv1d") and roles.from_architecture
            why = ", as PEFT puts no LoRA there" if layer else ""
            jobs.append(replace(job, factors=(), reason=f"{job.reason}; not in the adapter{why}"))
    return replace(plan, jobs=tuple(jobs))


def _check_compressible(job: Merge) -> None:
    """UsageError for a tensor whose experts have no factors, and for a rule that needs more than updates."""
    cure = "use --compress last"
    if not job.factored:
        raise UsageError("--compress first", f"not all experts have an adapter for tensor {job.name!r}", cure)
    if not looks_at_updates_alone(job.method.needs):
        what = f"{job.rule} needs more than the updates, and they are turned here"
        raise UsageError("--compress first", what, cure)


def _module(job: Merge, roles: Roles) -> str:
    """The module's name in the model where an adapter can change this tensor, else empty."""
    parameter = roles.identity[job.name]
    # A tied head goes by its embedding's name, which the checkpoint need not have.
    first = roles.by_name.get(parameter) or role_by_name(replace(job.spec, name=parameter), conv1d=False)
    linear = job.role.name in ("linear", "conv1d", "output_head") and len(job.spec.shape) == 2
    linear = linear and not in_module(job.name)[0]
    # A mixture's experts lie apart on disk and fused in memory, where no adapter of a layer reaches them.
    reachable = parameter.endswith(".weight") and first.name != "embedding" and expert_number(job.name) is None
    reachable = reachable and (parameter in roles.lora_targets or not roles.from_architecture)
    return parameter.removesuffix(".weight") if linear and reachable else ""


def _specs(job: Merge, module: str, rank: int, dtype: torch.dtype) -> tuple[TensorSpec, TensorSpec]:
    rows, columns = job.spec.shape[:: -1 if job.role.transposed else 1]
    A = TensorSpec(f"{PREFIX}{module}.lora_A.weight", dtype, (rank, columns))
    return A, TensorSpec(f"{PREFIX}{module}.lora_B.weight", dtype, (rows, rank))


@dataclass(frozen=True)
class Lost:
    """Of a tensor's merged update, its energy and the share of it that the adapter lacks."""

    energy: float
    share_lost: float


def truncated(
    job: Merge, factors: Sequence[TensorSpec], update: LowRankResult | Tensor | None
) -> tuple[tuple[Tensor, ...], Lost]:
    """What the adapter holds of a tensor's merged update, which is stored as the tensor is: `B A` is the best of its
    rank, its singular values shared by both; filled up with zeros. And what it lacks. `factors` are the job's.
    """
    if update is None:
        return tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in factors), Lost(0.0, 0.0)
    if not factors:
        energy = update.energy if isinstance(update, LowRankResult) else energies(update[None]).item()
        return (), Lost(energy, 1.0 if energy else 0.0)
    whole = update if isinstance(update, LowRankResult) else LowRankResult(update, None, LayerStats())
    whole = whole.transposed() if job.role.transposed else whole
    rank = factors[0].shape[0]
    B, A, lost = nearest_factors(whole, rank)
    missing = rank - len(A)
    filled = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
    stored = tuple(rounded(factor, job, spec.dtype) for factor, spec in zip(filled, factors, strict=True))
    return stored, Lost(whole.energy, lost)


def adapter_config(plan: Plan, roles: Roles, base_config: Mapping[str, Any]) -> bytes:
    """`adapter_config.json`: alpha is the rank, so that the factor on `B A` is 1."""
    inside = [(job, job.factors[0].name) for job in plan.merged if job.factors]
    modules = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for _, name in inside]
    parameters = [m for m in modules if roles.lora_targets.get(f"{m}.weight") == "parameter"]
    config = {
        "peft_type": "LORA",
        "task_type": task_type(base_config),
        "base_model_name_or_path": plan.recipe.base,
        "inference_mode": True,
        "r": plan.recipe.as_lora,
        "lora_alpha": plan.recipe.as_lora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(job.role.transposed for job, _ in inside),
        "init_lora_weights": True,
        "target_modules": [module for module in modules if module not in parameters],
        **({"target_parameters": [f"{module}.weight" for module in parameters]} if parameters else {}),
    }
    return json.dumps(config, indent=2).encode() + b"\n"
