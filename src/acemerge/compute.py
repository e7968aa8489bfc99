"""The arithmetic of one job: task vectors, the rule, the new weight in its output type."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acemerge.errors import CheckpointError, NumericalError
from acemerge.linalg.gram import energies
from acemerge.methods import LayerResult, Method
from acemerge.plan import Job, Source, keep_base
from acemerge.recipe import Recipe
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Computed:
    """The finished tensor, on the CPU in its output type, and what the manifest says of it."""

    value: Tensor
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What every job of a run shares: the models, their labels and the recipe."""

    recipe: Recipe
    base: Source
    experts: Sequence[Source]
    labels: Sequence[str]
    device: torch.device


def compute(job: Job, inputs: Inputs) -> Computed:
    """Read one tensor from every input and merge it.

    Raises CheckpointError for input that is not finite or does not agree, NumericalError for a result that is
    not finite in the output type.
    """
    started = time.perf_counter()
    try:
        base = inputs.base.read(job.name)
        _check_copies(job, base, inputs)
        value, record = _merged(job, job.method, base, inputs) if job.method else _kept(job, base, inputs)
    except (RuntimeError, MemoryError) as failure:  # torch's word for no memory and for no convergence
        reason = (str(failure).splitlines() or ["out of memory"])[0][:200]
        cure = "use --compute-dtype float64, fewer --workers or more memory"
        raise NumericalError(f"tensor {job.name!r}", reason, cure) from failure
    about = {"role": job.role.name, "rule": job.rule, "reason": job.reason}
    return Computed(value, {**about, **record, "seconds": round(time.perf_counter() - started, 6)})


def _kept(job: Job, base: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Any]]:
    if job.must_agree:
        for label, expert, name in zip(inputs.labels, inputs.experts, job.sources, strict=True):
            if name and not torch.equal(base, expert.read(name)):
                what = f"integer tensor {job.name!r} differs from the base's"
                raise CheckpointError(f"expert {label}", what, keep_base(job.name))
    elif base.dtype.is_floating_point:
        check_finite(base, job.name, "base")
    return _cast(base, job), {"status": "kept"}


def _merged(job: Job, method: Method, base: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Any]]:
    check_finite(base, job.name, "base")
    deltas, used = _task_vectors(job, base, inputs)
    n = energies(deltas)
    skipped = [label for i, label in enumerate(inputs.labels) if i not in used]
    record: dict[str, Any] = {"energies": n.tolist()}
    if skipped:
        record["skipped_experts"] = skipped
    if not (n > 0).any():  # the base's own bytes, the sign of zero included
        return _cast(base, job), {"status": "no update", **record}
    weights = torch.tensor([inputs.recipe.experts[i].weight for i in used], dtype=torch.float64, device=inputs.device)
    result = apply_rule(method, deltas.mT if job.transposed else deltas, weights)
    delta = result.delta.mT if job.transposed else result.delta
    value = delta.add_(base.to(device=delta.device, dtype=delta.dtype))  # never into base: it may be the caller's
    if not _is_finite(value):
        where, cure = f"tensor {job.name!r}", "use --compute-dtype float64 or a smaller scale"
        raise NumericalError(where, f"{method.name} gave values that are not finite", cure)
    return _cast(value, job), {**result.stats, **record}


def _task_vectors(job: Job, base: Tensor, inputs: Inputs) -> tuple[Float[Tensor, "T *shape"], list[int]]:
    """`D_t = W_t - W_0` in the compute type, and which experts they are from."""
    types = {base.dtype, *(e.tensors[name].dtype for e, name in zip(inputs.experts, job.sources, strict=True))}
    wide = inputs.recipe.compute_dtype == "float64" or torch.float64 in types
    dtype = torch.float64 if wide else torch.float32
    W0 = base.to(device=inputs.device, dtype=dtype)
    deltas = torch.empty(len(inputs.experts), *base.shape, dtype=dtype, device=inputs.device)
    used: list[int] = []
    for i, (expert, name) in enumerate(zip(inputs.experts, job.sources, strict=True)):
        Wt = expert.read(name)
        if inputs.recipe.nonfinite == "skip-expert" and not _is_finite(Wt):
            continue
        cure = "fetch it again, or leave the expert out with --nonfinite skip-expert"
        check_finite(Wt, name, f"expert {inputs.labels[i]}", cure)
        torch.sub(Wt.to(device=inputs.device, dtype=dtype), W0, out=deltas[len(used)])
        used.append(i)
    if not used:
        raise CheckpointError(f"tensor {job.name!r}", "no expert has finite values", "fetch the experts again")
    return deltas[: len(used)], used


def apply_rule(method: Method, deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> LayerResult:
    """The rule on a tensor of any shape: stacks of matrices go through a matrix rule slice by slice."""
    if not method.requires_matrix or deltas.ndim == 3:
        return method.merge(deltas, weights)
    results = [method.merge(deltas[:, i], weights) for i in range(deltas.shape[1])]
    statuses = sorted({str(result.stats["status"]) for result in results})
    slices = [dict(result.stats) for result in results]
    return LayerResult(torch.stack([r.delta for r in results]), {"status": ", ".join(statuses), "slices": slices})


def _check_copies(job: Job, base: Tensor, inputs: Inputs) -> None:
    """Both spellings of a tied tensor must hold the same values, or it was not tied."""
    for i, name in job.copies:
        source, label = (inputs.base, "base") if i == 0 else (inputs.experts[i - 1], f"expert {inputs.labels[i - 1]}")
        first = job.name if i == 0 else job.sources[i - 1]
        original = base if i == 0 else source.read(first)
        if not torch.equal(original.view(torch.uint8), source.read(name).view(torch.uint8)):
            what = f"tensors {first!r} and {name!r} should be tied but differ"
            raise CheckpointError(label, what, "set tie_word_embeddings to false in its config.json and the base's")


def _is_finite(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN wins both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_finite(values: Tensor, name: str, where: str, cure: str = "fetch it again") -> None:
    """CheckpointError with the coordinate of the first NaN or infinity."""
    if _is_finite(values):
        return
    place = (~torch.isfinite(values)).nonzero()[0].tolist()
    what = f"tensor {name!r} is {values[tuple(place)].item()} at {place}"
    raise CheckpointError(where, what, cure)


def _cast(value: Tensor, job: Job) -> Tensor:
    """Round once, to the output type."""
    result = value.to(device="cpu", dtype=job.spec.dtype)
    if job.spec.dtype.is_floating_point and not _is_finite(result):
        largest = value.abs().max().item()
        kind = str(job.spec.dtype).removeprefix("torch.")
        what = f"its largest magnitude {largest:g} overflows {kind}"
        raise NumericalError(f"tensor {job.name!r}", what, "write --dtype bfloat16 or float32")
    return result.contiguous()
