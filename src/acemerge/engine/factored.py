"""A tensor of which the experts give the factors of their updates: what a rule makes of these."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from acemerge.engine.updates import factors_of, own_factors
from acemerge.engine.work import Setting, Values
from acemerge.errors import CheckpointError
from acemerge.linalg.gram import energies
from acemerge.linalg.lowrank import LowRank
from acemerge.methods import Layer, LowRankResult, Method, merge_low_rank
from acemerge.methods.compressed import merge_compressed
from acemerge.methods.stats import of_projections
from acemerge.models.projections import Fused
from acemerge.output.records import TensorRecord, about
from acemerge.planning.finite import check_energies, check_finite, cure_of, is_finite, nothing_finite
from acemerge.planning.jobs import Merge
from acemerge.shapes import Tensor

_ROWS = 1024  # of the base that are looked at at once, in the compute type


def merge_factors_of(
    job: Merge, values: Values, setting: Setting, device: torch.device
) -> tuple[LowRankResult | None, TensorRecord]:
    """The merged update of a tensor, as it is stored, None where no expert has one, and what is said of it.

    Where the experts share their input side and the rule looks at it, the output side is used, see `merge_low_rank`.
    Raises CheckpointError for values that are not finite.
    """
    given = [_factors(job, i, values, setting, device) for i in range(len(setting.labels))]
    used = [i for i, pair in enumerate(given) if pair is not None]
    if not used:
        raise nothing_finite(job)
    pairs = [pair for pair in given if pair is not None]
    updates = LowRank(tuple(U for U, _ in pairs), tuple(V for _, V in pairs))
    n = updates.energies()
    check_energies(n, f"tensor {job.name!r}", job.compute_dtype)
    skipped = tuple(label for i, label in enumerate(setting.labels) if i not in used)
    record = replace(about(job), energies=tuple(n.tolist()), skipped_experts=skipped)
    if not n.any():
        return None, record
    layer = setting.layer(job, used, device)
    seen = updates.transposed() if job.transposed else updates
    W0 = values.take((0, job.name)) if job.method.needs.base_energy else None
    if W0 is not None and job.transposed:
        W0 = W0.mT
    if job.compressed and job.factors:
        rank = job.factors[0].shape[0]
        merged = merge_compressed(job.method, seen, _on_base(layer, W0, job.compute_dtype), job.compute_dtype, rank)
    elif job.fused:
        merged = _by_projection(job.method, job.fused, seen, layer, W0, job.compute_dtype)
    else:
        merged = merge_low_rank(job.method, seen, _on_base(layer, W0, job.compute_dtype), job.compute_dtype)
    return merged.transposed() if job.transposed else merged, replace(record, stats=merged.stats)


def _on_base(layer: Layer, W0: Tensor | None, dtype: torch.dtype) -> Layer:
    return layer if W0 is None else replace(layer, base_energy=energy_of(W0, layer.weights.device, dtype))


def energy_of(W0: Tensor, device: torch.device, dtype: torch.dtype) -> float:
    """`||W_0||_F^2`, some rows after the others: a base is not widened for it."""
    return sum(float(energies(rows.to(device, dtype)[None])) for rows in W0.split(_ROWS))


def _by_projection(
    method: Method, fused: Fused, updates: LowRank, layer: Layer, W0: Tensor | None, dtype: torch.dtype
) -> LowRankResult:
    """The rule on each of the projections that share a weight: each has rows of its own and factors of its own."""
    lefts = list(zip(*(fused.split(U) for U in updates.left), strict=True))
    bases = [None] * len(lefts) if W0 is None else fused.split(W0)
    parts = [
        merge_low_rank(method, LowRank(left, updates.right), _on_base(layer, base, dtype), dtype)
        for left, base in zip(lefts, bases, strict=True)
    ]
    stats = of_projections([part.stats for part in parts])
    rights = [part.right for part in parts if part.right is not None]
    if len(rights) < len(parts):
        return LowRankResult(fused.join([part.delta() for part in parts]), None, stats)
    ranks = [len(V) for V in rights]
    places = [(sum(ranks[:i]), sum(ranks[i + 1 :])) for i in range(len(ranks))]
    padded = [pad(part.left, place) for part, place in zip(parts, places, strict=True)]
    return LowRankResult(fused.join(padded), torch.cat(rights), stats)


def _factors(
    job: Merge, i: int, values: Values, setting: Setting, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """`D = U V` of the i-th expert, as the tensor is stored; None where it is to be left out."""
    update, label = job.updates[i], f"expert {setting.labels[i]}"
    if update is None:
        rows, columns = job.spec.shape
        nothing = torch.zeros(rows, 0, dtype=job.compute_dtype, device=device)
        return nothing, nothing.new_zeros(0, columns)
    stored = [values.take((i + 1, factor.name)) for factor in update.factors]
    A, B = (factor.to(device, job.compute_dtype) for factor in own_factors(stored[0], stored[1], update.stack))
    U, V = factors_of(A, B, update.scaling, update.transposed)
    if is_finite(U) and is_finite(V):
        return U, V
    if setting.recipe.nonfinite == "skip-expert":
        return None
    for factor, value in zip(update.factors, stored, strict=True):
        check_finite(value, factor.name, label, cure_of(setting.labels))
    raise CheckpointError(label, f"its update of tensor {job.name!r} is not finite", cure_of(setting.labels))
