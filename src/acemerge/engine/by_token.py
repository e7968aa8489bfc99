"""The arithmetic of tensors with a row per token, whose models have different vocabularies."""

from __future__ import annotations

from dataclasses import replace

import torch

from acemerge.engine.work import Place, Setting, Values
from acemerge.linalg.gram import energies
from acemerge.methods import Status
from acemerge.models.vocabulary import in_order, lent_rows, rows_of
from acemerge.output.records import TensorRecord, about
from acemerge.planning.finite import (
    check_energies,
    check_finite,
    cure_of,
    is_finite,
    nothing_finite,
    own_memory,
    rounded,
)
from acemerge.planning.jobs import MergeByToken
from acemerge.shapes import Float, Tensor

# What is stored, its record, and masks where the rule makes them.
Made = tuple[tuple[Tensor, ...], TensorRecord, tuple[Tensor, ...]]


def averaged_by_token(job: MergeByToken, base: Tensor, values: Values, setting: Setting, place: Place) -> Made:
    """Row by row the weighted mean of the experts that have the token, as updates of the base's row if there is one.

    `W_0 + scale sum_t w_t (W_t - W_0) / sum_t w_t`, the sums over those that have it.
    """
    check_finite(base, job.name, "base")
    W0 = torch.zeros(job.spec.shape, dtype=job.compute_dtype, device=place.device)
    W0[: len(base)] = base
    total, weights = torch.zeros_like(W0), torch.zeros(len(W0), dtype=W0.dtype, device=place.device)
    found: list[float] = []
    skipped: list[str] = []
    for i, (weight, label) in enumerate(zip(job.weights, setting.labels, strict=True)):
        Wt = values.take((i + 1, job.sources[i]))
        if setting.recipe.nonfinite == "error":
            check_finite(Wt, job.sources[i], f"expert {label}", cure_of(setting.labels))
        elif not is_finite(Wt):
            skipped.append(label)
            continue
        rows = job.vocabulary.sources[i].to(place.device)
        D = rows_of(Wt.to(W0), rows).sub_(W0)
        D[rows < 0] = 0
        n = energies(D[None])
        check_energies(n, f"tensor {job.name!r}", job.compute_dtype)
        found.append(n.item())
        total.add_(D, alpha=weight)
        weights.add_(rows >= 0, alpha=weight)
        values.release(i + 1)
    if not found:
        raise nothing_finite(job)
    shares = torch.where(weights != 0, job.method.scale / weights, 0)
    shares[len(base) :] /= job.method.scale or 1  # a row that the base lacks is no update: it is not scaled
    value = total.mul_(shares.view(-1, *[1] * (total.ndim - 1))).add_(W0)
    moved = value.shape != base.shape or any(found)
    record = about(job, Status.OK if moved else Status.NO_UPDATE)
    record = replace(record, energies=tuple(found), skipped_experts=tuple(skipped))
    return (rounded(value, job) if moved else own_memory(rounded(base, job), base),), record, ()


def lent_by_token(
    job: MergeByToken, values: Values, setting: Setting, space: Float[Tensor, "T1 *shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "T *shape"], Float[Tensor, " T"], list[int]]:
    """`W_0`, the task vectors, their energies and whose they are, all of them with every row of the output.

    What a model lacks is lent by the others, as the vocabulary says; so an expert without a token has no update of it
    where the base lends.
    """
    names = {0: job.name} | {i: name for i, name in enumerate(job.sources, 1) if name}
    matrices = {i: values.take((i, name)) for i, name in names.items()}
    for i, name in names.items():
        check_finite(matrices[i], name, f"expert {setting.labels[i - 1]}" if i else "base")
    lent = torch.empty_like(space[0])
    lent_rows(matrices, job.vocabulary, lent)
    W0, used = space[-1], [i for i in names if i]
    in_order(matrices[0], job.vocabulary.own(0), lent, W0)
    for D, i in zip(space, used, strict=False):
        in_order(matrices[i], job.vocabulary.own(i), lent, D)
        D.sub_(W0)
    deltas = space[: len(used)]
    return W0, deltas, energies(deltas), [i - 1 for i in used]
