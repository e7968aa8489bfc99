"""The arithmetic of one job: task vectors, the rule, the new weight in its output type."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.engine.agreement import differ_though_tied, differs_from_base
from acemerge.engine.applying import apply
from acemerge.engine.by_token import Made, averaged_by_token, lent_by_token
from acemerge.engine.factored import energy_of, merge_factors_of
from acemerge.engine.updates import add_update, own_factors
from acemerge.engine.work import Place, Setting, Values
from acemerge.errors import CheckpointError, NumericalError, shortage_of
from acemerge.linalg.device import with_host
from acemerge.linalg.gram import energies
from acemerge.methods import LowRankResult, Status
from acemerge.methods.stats import on_host
from acemerge.methods.status import of_all
from acemerge.output.packed_masks import pack
from acemerge.output.records import TensorRecord, about
from acemerge.planning.as_lora import truncated
from acemerge.planning.finite import (
    DOUBLE,
    check_energies,
    check_finite,
    cure_of,
    is_finite,
    nothing_finite,
    own_memory,
    rounded,
)
from acemerge.planning.jobs import ByRule, Job, Keep, Merge, MergeByToken
from acemerge.planning.pieces import Piece
from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class Computed:
    """What the output stores of a finished piece, on the CPU in its output type, and what the manifest says of it."""

    stored: tuple[Tensor, ...]
    record: TensorRecord
    masks: tuple[Tensor, ...] = ()  # one per expert, packed; of rules that make them

    @property
    def value(self) -> Tensor:
        """Of a model, where nothing else is stored of a piece."""
        return self.stored[0]


def compute(piece: Piece[Job], values: Values, setting: Setting, place: Place) -> Computed:
    """Merge one piece.

    Raises CheckpointError for input that is not finite or does not agree, NumericalError for a result that is
    not finite in the output type.
    """
    started = time.perf_counter()
    job = piece.job
    try:
        base = values.take((0, job.name))
        _check_copies(job, values, setting)
        try:
            with with_host(place.device) as host:
                stored, record, masks = _made(piece, base, values, setting, place)
            record = replace(record, stats=on_host(record.stats, host.helped))
        except SameInfinitiesError:
            none = None if isinstance(job, Keep) else (0.0,) * len(setting.labels)
            record, masks = replace(about(job, Status.KEPT), energies=none, infinite=True), ()
            stored = (own_memory(base.to(job.spec.dtype), base),)
    except (RuntimeError, MemoryError) as failure:  # torch's word for no memory and for no convergence
        reason = (str(failure).splitlines() or [type(failure).__name__])[0][:200]
        double = isinstance(job, ByRule) and job.compute_dtype == torch.float64
        other = "scale the updates to a size near 1, or give the tensor another rule in the recipe's rules"
        cure = other if double else DOUBLE
        where = f"tensor {job.name!r}"
        raise shortage_of(failure, where) or NumericalError(where, reason, cure) from failure
    return Computed(stored, replace(record, seconds=time.perf_counter() - started), masks)


def whole_record(records: Sequence[TensorRecord]) -> TensorRecord:
    """What the manifest says of a tensor, from the records of its pieces."""
    first, seconds = records[0], round(sum(r.seconds for r in records), 6)
    if len(records) == 1:
        return replace(first, seconds=seconds)
    moved = [r.stats.statuses for r in records if r.stats.statuses != (Status.NO_UPDATE,)]
    stats = replace(first.stats, statuses=of_all(moved) or (Status.NO_UPDATE,))
    rows = [r.energies for r in records if r.energies is not None]
    found = tuple(sum(parts) for parts in zip(*rows, strict=True)) if rows else None
    energy = None if first.energy is None else sum(r.energy or 0.0 for r in records)
    lost = None if first.energy is None else max(r.share_lost or 0.0 for r in records)  # all of it, or nothing
    merged = None if first.merged_energy is None else sum(r.merged_energy or 0.0 for r in records)
    before = None if first.base_energy is None else sum(r.base_energy or 0.0 for r in records)
    infinite = any(r.infinite for r in records)
    whole = replace(
        first, stats=stats, energies=found, base_energy=before, merged_energy=merged, infinite=infinite, seconds=seconds
    )
    return replace(whole, energy=energy, share_lost=lost)


def _made(piece: Piece[Job], base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job = piece.job
    if isinstance(job, Keep):
        return _kept(job, piece.first_row, base, values, setting)
    if isinstance(job, MergeByToken) and job.vocabulary.lending is None:
        return averaged_by_token(job, base, values, setting, place)
    if isinstance(job, Merge) and job.factored:
        return _from_factors(job, base, values, setting, place)
    if isinstance(job, Merge) and job.joined:
        return _of_one_weight(job, base, values, setting, place)
    return _merged(Piece(job, piece.rows), base, values, setting, place)


def _kept(job: Keep, first_row: int, base: Tensor, values: Values, setting: Setting) -> Made:
    for model, name in job.of_experts:
        value = values.take((model, name))
        if job.largest:
            base = torch.maximum(base, value)
        elif not torch.equal(base, value):
            raise differs_from_base(job, setting.who(model))
    if base.dtype.is_floating_point:
        if _is_mask(base):
            raise SameInfinitiesError
        check_finite(base, job.name, setting.who(0), first_row=first_row)
    return (own_memory(rounded(base, job), base),), about(job, Status.KEPT), ()


def _merged(piece: Piece[ByRule], base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    job, T = piece.job, len(setting.labels)
    with _updates(piece, base, values, setting, place) as (space, W0, deltas, n, used):
        skipped = tuple(label for i, label in enumerate(setting.labels) if i not in used)
        check_energies(n, f"tensor {job.name!r}", job.compute_dtype)
        before = float(energies(W0[None]))
        record = replace(about(job), energies=tuple(n.tolist()), base_energy=before, skipped_experts=skipped)
        if not (n > 0).any() and not job.method.needs.moves_equals:
            masks = torch.zeros(deltas.shape, dtype=torch.bool) if job.makes_masks else None
            same = base if isinstance(job, Merge) else W0
            return (*_unchanged(job, same, record), _packed(masks, used, T))
        result = apply(job, deltas, W0, used, setting, None if place.common is None else place.common.known)
        record = replace(record, stats=result.stats, merged_energy=float(energies(result.delta[None])))
        if isinstance(job, Merge) and job.factors is not None:
            return (*_in_adapter(job, job.factors, result.delta, record), ())
        update = result.delta if place.common is None else own_memory(result.delta, space)
        value = update.add_(W0)
        return (own_memory(rounded(value, job), space),), record, _packed(result.masks, used, T)


_Updates = tuple[Tensor, Tensor, Tensor, Tensor, list[int]]


@contextlib.contextmanager
def _updates(piece: Piece[ByRule], base: Tensor, values: Values, setting: Setting, place: Place) -> Iterator[_Updates]:
    """The space for the task vectors of a piece, and what `all_task_vectors` puts there. Rules that have them in common
    find those of the first.
    """
    job = piece.job

    @contextlib.contextmanager
    def made() -> Iterator[_Updates]:
        with place.space((len(setting.labels) + 1, *piece.shape), job.compute_dtype) as space:
            yield (space, *all_task_vectors(piece, base, values, setting, space))

    if place.common is None or not isinstance(job, Merge):
        with made() as found:
            yield found
    else:
        yield place.common.updates((job.compute_dtype, job.absent, job.updates, setting.recipe.nonfinite), made)


def _of_one_weight(job: Merge, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    """A projection that is merged with others as one weight: all of it is made, and its own rows are kept."""
    T, own = len(setting.labels), job.rows_of(job.name)
    with place.space((T + 1, *job.as_one.spec.shape), job.compute_dtype) as space:
        W0, deltas = space[T], space[:T]
        for part in job.joined:
            _fill(part, values, setting, W0[job.rows_of(part.name)], deltas[:, job.rows_of(part.name)])
        n = energies(deltas)
        before, found = float(energies(W0[own][None])), tuple(energies(deltas[:, own]).tolist())
        record = replace(about(job), energies=found, base_energy=before)
        if not (n > 0).any() and not job.method.needs.moves_equals:
            return (*_unchanged(job, base, record), ())
        result = apply(job.as_one, deltas, W0, range(T), setting)
        M = result.delta[own]
        record = replace(record, stats=result.stats, merged_energy=float(energies(M[None])))
        return (own_memory(rounded(M + W0[own], job), space),), record, ()


def _fill(part: Merge, values: Values, setting: Setting, W0: Tensor, deltas: Tensor) -> None:
    """A projection's base and task vectors, into rows of the weight that it is part of. All must be finite."""
    W0.copy_(values.take((0, part.name)))
    for i, D in enumerate(deltas):
        _difference(part, i, values, W0, D)
        if not math.isfinite(energies(D[None]).item()):
            check_finite(W0, part.name, "base")
            check_finite(values.take((i + 1, part.sources[i])), part.sources[i], f"expert {setting.labels[i]}")


def all_task_vectors(
    piece: Piece[ByRule], base: Tensor, values: Values, setting: Setting, space: Float[Tensor, "T1 *shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "T *shape"], Float[Tensor, " T"], list[int]]:
    """`W_0`, the task vectors, their energies and whose they are, all in `space`: with every row of the output."""
    job, T = piece.job, len(setting.labels)
    if isinstance(job, MergeByToken):
        return lent_by_token(job, values, setting, space)
    W0 = space[T].copy_(base)
    return W0, *task_vectors(Piece(job, piece.rows), values, setting, W0, space[:T])


def _from_factors(job: Merge, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    check_finite(base, job.name, "base")
    update, record = merge_factors_of(job, values, setting, place.device)
    record = replace(record, base_energy=energy_of(base, place.device, job.compute_dtype))
    if update is None:
        return (*_unchanged(job, base, record), ())
    record = replace(record, merged_energy=update.energy)
    if job.factors is not None:
        return (*_in_adapter(job, job.factors, update, record), ())
    with place.space(job.spec.shape, job.compute_dtype) as W0:
        return (own_memory(rounded(update.added_to(W0.copy_(base)), job), W0),), record, ()


def _in_adapter(
    job: Merge, factors: Sequence[TensorSpec], update: LowRankResult | Tensor | None, record: TensorRecord
) -> tuple[tuple[Tensor, ...], TensorRecord]:
    stored, lost = truncated(job, factors, update)
    return stored, replace(record, energy=lost.energy, share_lost=lost.share_lost)


def _unchanged(job: ByRule, base: Tensor, record: TensorRecord) -> tuple[tuple[Tensor, ...], TensorRecord]:
    """What is stored where no expert has an update: the base's own bytes, the sign of zero included."""
    record = replace(record, merged_energy=0.0)
    if isinstance(job, Merge) and job.factors is not None:
        return _in_adapter(job, job.factors, None, record)
    return (own_memory(rounded(base, job), base),), record


def task_vectors(
    piece: Piece[Merge],
    values: Values,
    setting: Setting,
    W0: Float[Tensor, "*shape"],
    space: Float[Tensor, "T *shape"],
) -> tuple[Float[Tensor, "T *shape"], Float[Tensor, " T"], list[int]]:
    """`D_t = W_t - W_0` in the compute type, in `space`, their energies, and which experts they are from.

    An expert that is absent has none.

    A finite energy tells that both weights are finite; only where it is not are they looked at one by one.
    """
    job, T = piece.job, len(setting.labels)
    if not any(job.sources):  # an update alone does not tell
        check_finite(W0, job.name, "base", first_row=piece.first_row)
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


def _difference(job: Merge, i: int, values: Values, W0: Float[Tensor, "*shape"], D: Float[Tensor, "*shape"]) -> None:
    """The i-th expert's task vector, into `D`."""
    if job.sources[i]:
        D.copy_(values.take((i + 1, job.sources[i]))).sub_(W0)
    else:
        D.zero_()
    update = job.updates[i] if job.updates else None
    if update is not None:
        A, B, *magnitude = (values.take((i + 1, factor.name)) for factor in update.factors)
        A, B, *magnitude = (f.to(D.device, D.dtype) for f in (*own_factors(A, B, update.stack), *magnitude))
        seen = (D.mT, W0.mT) if update.transposed else (D, W0)
        add_update(*seen, A, B, update.scaling, *magnitude)


def _checked(piece: Piece[Merge], i: int, W0: Tensor, D: Tensor, values: Values, setting: Setting) -> bool:
    """Whether the i-th expert is to be used although its energy is not finite: what is wrong with it is not that its
    own values are not.
    """
    job, label, skip = piece.job, f"expert {setting.labels[i]}", setting.recipe.nonfinite == "skip-expert"
    if _is_mask(W0) and _all_have(piece, values):
        raise SameInfinitiesError
    check_finite(W0, job.name, "base", first_row=piece.first_row)
    for model, name in job.inputs:
        if model == i + 1 and (model, name) not in job.copies:
            value = values.take((model, name))
            if skip and not is_finite(value):
                return False
            check_finite(value, name, label, cure_of(setting.labels), piece.first_row)
    if any(job.updates[i : i + 1]) and not is_finite(D):  # finite factors, and what they make is not
        if not skip:
            raise CheckpointError(label, f"its update of tensor {job.name!r} is not finite", cure_of(setting.labels))
        return False
    return True


class SameInfinitiesError(Exception):
    """A buffer such as an attention mask, with infinities that all models have: it is the base's own. Who asks for
    task vectors has none of it.
    """


def _is_mask(base: Tensor) -> bool:
    """Whether a tensor holds infinities and no NaN."""
    return not is_finite(base) and not bool(base.isnan().any())


def _all_have(piece: Piece[Merge], values: Values) -> bool:
    """Whether every expert stores the base's own values, none of them let go of yet."""
    job = piece.job
    if job.makes_masks or job.factors is not None or not all(job.sources):
        return False
    base = values.take((0, job.name))
    return all(torch.equal(base, values.take((t, name))) for t, name in enumerate(job.sources, 1))


def _packed(masks: Tensor | None, used: Sequence[int], experts: int) -> tuple[Tensor, ...]:
    """One packed mask per expert of the recipe; an expert that was skipped has none of the update."""
    if masks is None:
        return ()
    nothing = torch.zeros_like(masks[0])
    return tuple(pack(masks[used.index(i)] if i in used else nothing) for i in range(experts))


def _check_copies(job: Job, values: Values, setting: Setting) -> None:
    """Both spellings of a tied tensor must hold the same values, or it was not tied."""
    for model, name in job.copies:
        first = job.first_spelling(model)
        original, copy = values.take((model, first)), values.take((model, name))
        if not torch.equal(original.view(torch.uint8), copy.view(torch.uint8)):
            raise differ_though_tied(job, model, name, setting.who(model))
