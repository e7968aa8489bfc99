"""The arithmetic of one job: task vectors, the rule, the new weight in its output type."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acemerge.engine.applying import apply
from acemerge.engine.by_token import Made, averaged_by_token, lent_by_token
from acemerge.engine.factored import merge_factors_of
from acemerge.engine.updates import add_update, own_factors
from acemerge.engine.work import Place, Setting, Values
from acemerge.errors import CheckpointError, NumericalError
from acemerge.linalg.gram import energies
from acemerge.output.masks import pack
from acemerge.planning.as_lora import truncated
from acemerge.planning.finite import LEAVE_OUT, check_finite, is_finite, nothing_finite, own_memory, rounded
from acemerge.planning.jobs import Job, Piece
from acemerge.planning.planner import keep_apart
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Computed:
    """What the output stores of a finished piece, on the CPU in its output type, and what the manifest says of it."""

    stored: tuple[Tensor, ...]
    record: Mapping[str, Any]
    masks: tuple[Tensor, ...] = ()  # one per expert, packed; of rules that make them

    @property
    def value(self) -> Tensor:
        """Of a model, where nothing else is stored of a piece."""
        return self.stored[0]


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
        stored, record, masks = made(piece, base, values, setting, place)
    except (RuntimeError, MemoryError) as failure:  # torch's word for no memory and for no convergence
        reason = (str(failure).splitlines() or ["out of memory"])[0][:200]
        cure = "use --compute-dtype float64, fewer --workers or more memory"
        raise NumericalError(f"tensor {job.name!r}", reason, cure) from failure
    return Computed(stored, {**about(job), **record, "seconds": time.perf_counter() - started}, masks)


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
        if "energy" in record:  # all of it is in an adapter, or nothing
            record["energy"] = sum(r["energy"] for r in records)
            record["share_lost"] = max(r["share_lost"] for r in records)
    return record


def _kept(piece: Piece, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job = piece.job
    if job.must_agree:
        for model, name in job.inputs[1:]:
            if not torch.equal(base, values.take((model, name))):
                what = f"integer tensor {job.name!r} differs from the base's"
                raise CheckpointError(setting.who(model), what, keep_apart(job.name))
    elif base.dtype.is_floating_point:
        check_finite(base, job.name, setting.who(0), first_row=_first_row(piece))
    return (own_memory(rounded(base, job), base),), {"status": "kept"}, ()


def _merged(piece: Piece, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job, T = piece.job, len(setting.labels)
    if job.factored:
        return _from_factors(piece, base, values, setting, place)
    with place.space((T + 1, *piece.shape), job.compute_dtype) as space:
        if job.vocabulary is not None:
            W0, deltas, n, used = lent_by_token(job, values, setting, space)
        else:
            W0 = space[T].copy_(base)
            deltas, n, used = task_vectors(piece, values, setting, W0, space[:T])
        record: dict[str, Any] = {"energies": n.tolist()}
        if len(used) < T:
            record["skipped_experts"] = [label for i, label in enumerate(setting.labels) if i not in used]
        assert job.method is not None
        if not (n > 0).any() and not job.method.needs.moves_equals:
            masks = torch.zeros(deltas.shape, dtype=torch.bool) if job.makes_masks else None
            same = base if job.vocabulary is None else W0
            return (*_unchanged(job, same, record), _packed(masks, used, T))
        result = apply(job, deltas, W0, used, setting)
        record = {**result.stats, **record}
        if job.factors is not None:
            stored, lacking = truncated(job, result.delta)
            return stored, {**record, **lacking}, ()
        value = result.delta.add_(W0)
        return (own_memory(rounded(value, job), space),), record, _packed(result.masks, used, T)


def _from_factors(piece: Piece, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job = piece.job
    check_finite(base, job.name, "base")
    update, record = merge_factors_of(job, values, setting, place.device)
    if update is None:
        return (*_unchanged(job, base, record), ())
    if job.factors is not None:
        stored, lacking = truncated(job, update)
        return stored, {**record, **lacking}, ()
    with place.space(piece.shape, job.compute_dtype) as W0:
        return (own_memory(rounded(update.added_to(W0.copy_(base)), job), W0),), record, ()


def _unchanged(job: Job, base: Tensor, record: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What is stored where no expert has an update: the base's own bytes, the sign of zero included."""
    if job.factors is None:
        return (own_memory(rounded(base, job), base),), {"status": "no update", **record}
    stored, lacking = truncated(job, None)
    return stored, {"status": "no update", **record, **lacking}


def task_vectors(
    piece: Piece, values: Values, setting: Setting, W0: Float[Tensor, "*shape"], space: Float[Tensor, "T *shape"]
) -> tuple[Float[Tensor, "T *shape"], Float[Tensor, " T"], list[int]]:
    """`D_t = W_t - W_0` in the compute type, in `space`, their energies, and which experts they are from.

    An expert that is absent has none.

    A finite energy tells that both weights are finite; only where it is not are they looked at one by one.
    """
    job, T = piece.job, len(setting.labels)
    if not any(job.sources):  # an update alone does not tell
        check_finite(W0, job.name, "base", first_row=_first_row(piece))
    used: list[int] = []
    found: list[Tensor] = []
    for i in (i for i in range(T) if i not in job.absent):
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
        A, B = own_factors(A, B, update.stack)
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
            cure = "set tie_word_embeddings to false in its config.json"
            cure += "; of an adapter, merge it into its base with peft first" if model else ""
            raise CheckpointError(setting.who(model), what, cure)


def _first_row(piece: Piece) -> int:
    return piece.rows[0] if piece.rows else 0
