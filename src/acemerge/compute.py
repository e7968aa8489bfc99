"""The arithmetic of one job: task vectors, the rule, the new weight in its output type."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from acemerge.checkpoints.masks import pack
from acemerge.errors import CheckpointError, NumericalError
from acemerge.linalg.gram import energies
from acemerge.methods import Layer, LayerResult, Method, check_experts, expert_seeds
from acemerge.plan import Job, Source, keep_base
from acemerge.recipe import Recipe
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Computed:
    """The finished tensor, on the CPU in its output type, and what the manifest says of it."""

    value: Tensor
    record: Mapping[str, Any]
    masks: tuple[Tensor, ...] = ()  # one per expert, packed; of rules that make them


@dataclass(frozen=True)
class Inputs:
    """What every job of a run shares: the models, their labels and the recipe.

    `thresholds` holds, for each share that a rule keeps of the whole model, one magnitude per expert.
    """

    recipe: Recipe
    base: Source
    experts: Sequence[Source]
    labels: Sequence[str]
    device: torch.device
    thresholds: Mapping[float, Sequence[float]] = field(default_factory=dict)


def compute(job: Job, inputs: Inputs) -> Computed:
    """Read one tensor from every input and merge it.

    Raises CheckpointError for input that is not finite or does not agree, NumericalError for a result that is
    not finite in the output type.
    """
    started = time.perf_counter()
    try:
        base = inputs.base.read(job.name)
        _check_copies(job, base, inputs)
        value, record, masks = _merged(job, job.method, base, inputs) if job.method else _kept(job, base, inputs)
    except (RuntimeError, MemoryError) as failure:  # torch's word for no memory and for no convergence
        reason = (str(failure).splitlines() or ["out of memory"])[0][:200]
        cure = "use --compute-dtype float64, fewer --workers or more memory"
        raise NumericalError(f"tensor {job.name!r}", reason, cure) from failure
    about = {"role": job.role.name, "rule": job.rule, "reason": job.reason}
    return Computed(value, {**about, **record, "seconds": round(time.perf_counter() - started, 6)}, masks)


# The finished tensor, its record, and masks where the rule makes them.
_Made = tuple[Tensor, dict[str, Any], tuple[Tensor, ...]]


def _kept(job: Job, base: Tensor, inputs: Inputs) -> _Made:
    if job.must_agree:
        for label, expert, name in zip(inputs.labels, inputs.experts, job.sources, strict=True):
            if name and not torch.equal(base, expert.read(name)):
                what = f"integer tensor {job.name!r} differs from the base's"
                raise CheckpointError(f"expert {label}", what, keep_base(job.name))
    elif base.dtype.is_floating_point:
        check_finite(base, job.name, "base")
    return _cast(base, job), {"status": "kept"}, ()


def _merged(job: Job, method: Method, base: Tensor, inputs: Inputs) -> _Made:
    check_finite(base, job.name, "base")
    deltas, used = task_vectors(job, base, inputs)
    n = energies(deltas)
    skipped = [label for i, label in enumerate(inputs.labels) if i not in used]
    record: dict[str, Any] = {"energies": n.tolist()}
    if skipped:
        record["skipped_experts"] = skipped
    if not (n > 0).any():  # the base's own bytes, the sign of zero included
        masks = torch.zeros(deltas.shape, dtype=torch.bool) if method.needs.masks else None
        return _cast(base, job), {"status": "no update", **record}, _packed(masks, used, inputs)
    layer = _layer(job, method, base, used, inputs)
    check_experts(method, layer.weights.tolist())
    result = apply_rule(method, deltas.mT if job.transposed else deltas, layer)
    delta = result.delta.mT if job.transposed else result.delta
    value = delta.add_(base.to(device=delta.device, dtype=delta.dtype))  # never into base: it may be the caller's
    if not is_finite(value):
        where, cure = f"tensor {job.name!r}", "use --compute-dtype float64 or a smaller scale"
        raise NumericalError(where, f"{method.name} gave values that are not finite", cure)
    masks = result.masks.mT if result.masks is not None and job.transposed else result.masks
    return _cast(value, job), {**result.stats, **record}, _packed(masks, used, inputs)


def _layer(job: Job, method: Method, base: Tensor, used: Sequence[int], inputs: Inputs) -> Layer:
    """What the rule may know of this tensor, for the experts in use."""
    recipe, needs = inputs.recipe, method.needs
    weights = torch.tensor([recipe.experts[i].weight for i in used], dtype=torch.float64, device=inputs.device)
    thresholds = None if needs.keep is None else tuple(inputs.thresholds[needs.keep][i] for i in used)
    W0: Tensor | None = None
    if needs.base:
        W0 = base.to(device=inputs.device, dtype=_compute_dtype(job, base, inputs))
        W0 = W0.mT if job.transposed else W0
    return Layer(weights, expert_seeds(recipe.seed, job.name, used), thresholds, W0)


def _compute_dtype(job: Job, base: Tensor, inputs: Inputs) -> torch.dtype:
    types = {base.dtype, *(e.tensors[name].dtype for e, name in zip(inputs.experts, job.sources, strict=True))}
    wide = inputs.recipe.compute_dtype == "float64" or torch.float64 in types
    return torch.float64 if wide else torch.float32


def task_vectors(job: Job, base: Tensor, inputs: Inputs) -> tuple[Float[Tensor, "T *shape"], list[int]]:
    """`D_t = W_t - W_0` in the compute type, and which experts they are from."""
    dtype = _compute_dtype(job, base, inputs)
    W0 = base.to(device=inputs.device, dtype=dtype)
    deltas = torch.empty(len(inputs.experts), *base.shape, dtype=dtype, device=inputs.device)
    used: list[int] = []
    for i, (expert, name) in enumerate(zip(inputs.experts, job.sources, strict=True)):
        Wt = expert.read(name)
        if inputs.recipe.nonfinite == "skip-expert" and not is_finite(Wt):
            continue
        cure = "fetch it again, or leave the expert out with --nonfinite skip-expert"
        check_finite(Wt, name, f"expert {inputs.labels[i]}", cure)
        torch.sub(Wt.to(device=inputs.device, dtype=dtype), W0, out=deltas[len(used)])
        used.append(i)
    if not used:
        raise CheckpointError(f"tensor {job.name!r}", "no expert has finite values", "fetch the experts again")
    return deltas[: len(used)], used


def apply_rule(method: Method, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
    """The rule on a tensor of any shape: stacks of matrices go through a matrix rule slice by slice."""
    if not method.needs.matrix or deltas.ndim == 3:
        return method.merge(deltas, layer)
    results = [method.merge(deltas[:, i], layer.part(i)) for i in range(deltas.shape[1])]
    statuses = sorted({str(result.stats["status"]) for result in results})
    slices = [dict(result.stats) for result in results]
    return LayerResult(torch.stack([r.delta for r in results]), {"status": ", ".join(statuses), "slices": slices})


def _packed(masks: Tensor | None, used: Sequence[int], inputs: Inputs) -> tuple[Tensor, ...]:
    """One packed mask per expert of the recipe; an expert that was skipped has none of the update."""
    if masks is None:
        return ()
    nothing = torch.zeros_like(masks[0])
    return tuple(pack(masks[used.index(i)] if i in used else nothing) for i in range(len(inputs.experts)))


def _check_copies(job: Job, base: Tensor, inputs: Inputs) -> None:
    """Both spellings of a tied tensor must hold the same values, or it was not tied."""
    for i, name in job.copies:
        source, label = (inputs.base, "base") if i == 0 else (inputs.experts[i - 1], f"expert {inputs.labels[i - 1]}")
        first = job.name if i == 0 else job.sources[i - 1]
        original = base if i == 0 else source.read(first)
        if not torch.equal(original.view(torch.uint8), source.read(name).view(torch.uint8)):
            what = f"tensors {first!r} and {name!r} should be tied but differ"
            raise CheckpointError(label, what, "set tie_word_embeddings to false in its config.json and the base's")


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN wins both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_finite(values: Tensor, name: str, where: str, cure: str = "fetch it again") -> None:
    """CheckpointError with the coordinate of the first NaN or infinity."""
    if is_finite(values):
        return
    place = (~torch.isfinite(values)).nonzero()[0].tolist()
    what = f"tensor {name!r} is {values[tuple(place)].item()} at {place}"
    raise CheckpointError(where, what, cure)


def _cast(value: Tensor, job: Job) -> Tensor:
    """Round once, to the output type."""
    result = value.to(device="cpu", dtype=job.spec.dtype)
    if job.spec.dtype.is_floating_point and not is_finite(result):
        largest = value.abs().max().item()
        kind = str(job.spec.dtype).removeprefix("torch.")
        what = f"its largest magnitude {largest:g} overflows {kind}"
        raise NumericalError(f"tensor {job.name!r}", what, "write --dtype bfloat16 or float32")
    return result.contiguous()
