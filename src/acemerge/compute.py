"""The arithmetic of one job: task vectors, the rule, the new weight in its output type."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acemerge.adapters import add_update
from acemerge.by_token import Made, averaged_by_token, lent_by_token
from acemerge.checkpoints.masks import pack
from acemerge.errors import CheckpointError, NumericalError
from acemerge.finite import LEAVE_OUT, check_finite, is_finite, nothing_finite, own_memory, rounded
from acemerge.jobs import Job, Piece
from acemerge.linalg.gram import energies
from acemerge.methods import Layer, LayerResult, Method, check_experts, expert_seeds
from acemerge.plan import keep_base
from acemerge.projections import Fused
from acemerge.shapes import Float, Tensor
from acemerge.work import Place, Setting, Values


@dataclass(frozen=True)
class Computed:
    """A finished piece, on the CPU in its output type, and what the manifest says of it."""

    value: Tensor
    record: Mapping[str, Any]
    masks: tuple[Tensor, ...] = ()  # one per expert, packed; of rules that make them


def compute(piece: Piece, values: Values, setting: Setting, place: Place) -> Computed:
    """Merge one piece.

    Raises CheckpointError for input that is not finite or does not agree, NumericalError for a result that is
    not finite in the output type.
    """
    started = time.perf_counter()
    job = piece.job
    try:
        base = values.take((0, job.name))
        _check_copies(job, values, setting)
        averaged = job.vocabulary is not None and job.vocabulary.lending is None
        made = averaged_by_token if averaged else _merged if job.method else _kept
        value, record, masks = made(piece, base, values, setting, place)
    except (RuntimeError, MemoryError) as failure:  # torch's word for no memory and for no convergence
        reason = (str(failure).splitlines() or ["out of memory"])[0][:200]
        cure = "use --compute-dtype float64, fewer --workers or more memory"
        raise NumericalError(f"tensor {job.name!r}", reason, cure) from failure
    return Computed(value, {**about(job), **record, "seconds": time.perf_counter() - started}, masks)


def about(job: Job) -> dict[str, Any]:
    """What the manifest says of any tensor."""
    return {"role": job.role.name, "rule": job.rule, "reason": job.reason}


def whole_record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of a tensor, from the records of its pieces."""
    record = dict(records[0])
    record["seconds"] = round(sum(r["seconds"] for r in records), 6)
    if len(records) > 1:
        statuses = {r["status"] for r in records}
        record["status"] = "no update" if statuses == {"no update"} else min(statuses - {"no update"})
        if "energies" in record:
            record["energies"] = [sum(parts) for parts in zip(*(r["energies"] for r in records), strict=True)]
    return record


def _kept(piece: Piece, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job = piece.job
    if job.must_agree:
        for model, name in job.inputs[1:]:
            if not torch.equal(base, values.take((model, name))):
                what = f"integer tensor {job.name!r} differs from the base's"
                raise CheckpointError(f"expert {setting.labels[model - 1]}", what, keep_base(job.name))
    elif base.dtype.is_floating_point:
        check_finite(base, job.name, "base", first_row=_first_row(piece))
    return own_memory(rounded(base, job), base), {"status": "kept"}, ()


def _merged(piece: Piece, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job, T = piece.job, len(setting.labels)
    with place.space((T + 1, *piece.shape), job.compute_dtype) as space:
        if job.vocabulary is not None:
            W0, deltas, n, used = lent_by_token(job, values, setting, space)
        else:
            W0 = space[T].copy_(base)
            deltas, n, used = task_vectors(piece, values, setting, W0, space[:T])
        record: dict[str, Any] = {"energies": n.tolist()}
        if len(used) < T - len(job.without):
            kept = {*used, *job.without}
            record["skipped_experts"] = [label for i, label in enumerate(setting.labels) if i not in kept]
        assert job.method is not None
        if not (n > 0).any() and not job.method.needs.moves_equals:  # the base's own bytes, the sign of zero included
            masks = torch.zeros(deltas.shape, dtype=torch.bool) if job.makes_masks else None
            same = base if job.vocabulary is None else W0
            return own_memory(rounded(same, job), same), {"status": "no update", **record}, _packed(masks, used, T)
        result = _apply(job, deltas, W0, used, setting)
        value = result.delta.add_(W0)
        return own_memory(rounded(value, job), space), {**result.stats, **record}, _packed(result.masks, used, T)


def _apply(job: Job, deltas: Tensor, W0: Tensor, used: Sequence[int], setting: Setting) -> LayerResult:
    """The rule's result for this tensor, stored as the tensor is."""
    assert job.method is not None
    layer = layer_of(job, used, setting, W0.mT if job.transposed else W0)
    turned = deltas.mT if job.transposed else deltas
    result = (
        _by_projection(job.method, job.fused, turned, layer) if job.fused else apply_rule(job.method, turned, layer)
    )
    if not job.transposed:
        return result
    return LayerResult(result.delta.mT, result.stats, None if result.masks is None else result.masks.mT)


def layer_of(job: Job, used: Sequence[int], setting: Setting, W0: Tensor) -> Layer:
    """What the job's rule may know of its layer; `W0` as the rule sees it. UsageError for experts it cannot take."""
    assert job.method is not None
    needs = job.method.needs
    weights = torch.tensor([job.weights[i] for i in used], dtype=torch.float64, device=W0.device)
    check_experts(job.method, weights.tolist())
    thresholds = None if needs.keep is None else tuple(setting.thresholds[needs.keep][i] for i in used)
    return Layer(weights, expert_seeds(setting.recipe.seed, job.name, used), thresholds, W0 if needs.base else None)


def task_vectors(
    piece: Piece, values: Values, setting: Setting, W0: Float[Tensor, "*shape"], space: Float[Tensor, "T *shape"]
) -> tuple[Float[Tensor, "T *shape"], Float[Tensor, " T"], list[int]]:
    """`D_t = W_t - W_0` in the compute type, in `space`, their energies, and which experts they are from.

    A finite energy tells that both weights are finite; only where it is not are they looked at one by one.
    """
    job, T = piece.job, len(setting.labels)
    if not any(job.sources):  # an update alone does not tell
        check_finite(W0, job.name, "base", first_row=_first_row(piece))
    used: list[int] = []
    found: list[Tensor] = []
    for i in (i for i in range(T) if i not in job.without):
        D = space[len(used)]
        _difference(job, i, values, W0, D)
        n = energies(D[None])
        if math.isfinite(n.item()) or _checked(piece, i, W0, D, values, setting):
            used.append(i)
            found.append(n)
        values.release(i + 1)
    if not used:
        raise nothing_finite(job)
    return space[: len(used)], torch.cat(found), used


def _difference(job: Job, i: int, values: Values, W0: Float[Tensor, "*shape"], D: Float[Tensor, "*shape"]) -> None:
    """The i-th expert's task vector, into `D`."""
    if job.sources[i]:
        D.copy_(values.take((i + 1, job.sources[i]))).sub_(W0)
    else:
        D.zero_()
    update = job.updates[i] if job.updates else None
    if update is not None:
        A, B, *magnitude = (values.take((i + 1, factor.name)).to(D.device, D.dtype) for factor in update.factors)
        seen = (D.mT, W0.mT) if update.transposed else (D, W0)
        add_update(*seen, A, B, update.scaling, *magnitude)


def _checked(piece: Piece, i: int, W0: Tensor, D: Tensor, values: Values, setting: Setting) -> bool:
    """Whether the i-th expert is to be used although its energy is not finite: all values are, but large."""
    job, label, skip = piece.job, f"expert {setting.labels[i]}", setting.recipe.nonfinite == "skip-expert"
    check_finite(W0, job.name, "base", first_row=_first_row(piece))
    for model, name in job.inputs:
        if model == i + 1 and (model, name) not in job.copies:
            value = values.take((model, name))
            if skip and not is_finite(value):
                return False
            check_finite(value, name, label, LEAVE_OUT, _first_row(piece))
    if any(job.updates[i : i + 1]) and not is_finite(D):  # finite factors, and what they make is not
        if not skip:
            raise CheckpointError(label, f"its update of tensor {job.name!r} is not finite", LEAVE_OUT)
        return False
    return True


def apply_rule(method: Method, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
    """The rule on a tensor of any shape: stacks of matrices go through a matrix rule slice by slice."""
    if not method.needs.matrix or deltas.ndim == 3:
        return method.merge(deltas, layer)
    results = [method.merge(deltas[:, i], layer.part(i)) for i in range(deltas.shape[1])]
    statuses = sorted({str(result.stats["status"]) for result in results})
    slices = [dict(result.stats) for result in results]
    return LayerResult(torch.stack([r.delta for r in results]), {"status": ", ".join(statuses), "slices": slices})


def _by_projection(method: Method, fused: Fused, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
    """The rule on each of the projections that share a weight."""
    results = [method.merge(part, layer) for part in fused.split(deltas)]
    status = ", ".join(sorted({str(result.stats["status"]) for result in results}))
    stats = {"status": status, "projections": [dict(result.stats) for result in results]}
    return LayerResult(fused.join([result.delta for result in results]), stats)


def _packed(masks: Tensor | None, used: Sequence[int], experts: int) -> tuple[Tensor, ...]:
    """One packed mask per expert of the recipe; an expert that was skipped has none of the update."""
    if masks is None:
        return ()
    nothing = torch.zeros_like(masks[0])
    return tuple(pack(masks[used.index(i)] if i in used else nothing) for i in range(experts))


def _check_copies(job: Job, values: Values, setting: Setting) -> None:
    """Both spellings of a tied tensor must hold the same values, or it was not tied."""
    firsts = {0: job.name} | dict(enumerate(job.sources, 1))
    for model, name in job.copies:
        first = firsts[model]
        original, copy = values.take((model, first)), values.take((model, name))
        if not torch.equal(original.view(torch.uint8), copy.view(torch.uint8)):
            what = f"tensors {first!r} and {name!r} should be tied but differ"
            label = f"expert {setting.labels[model - 1]}" if model else "base"
            raise CheckpointError(label, what, "set tie_word_embeddings to false in its config.json and the base's")


def _first_row(piece: Piece) -> int:
    return piece.rows[0] if piece.rows else 0
