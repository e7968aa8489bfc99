"""What must be the same in several places, compared before anything is merged: a plan finds what a merge refuses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.reader import Reader, Span
from acemerge.engine.work import Setting
from acemerge.errors import CheckpointError, Cure, fetching
from acemerge.models.roles import role_by_name
from acemerge.planning.jobs import Input, Job, Keep, Plan
from acemerge.planning.planner import UNQUANTISED, keep_apart
from acemerge.shapes import Tensor

_BLOCK = 32 << 20  # bytes of a tensor that are compared at once
_QUANTISED = re.compile(r"(weight\w*|qzeros|blocks|scales)$")  # how weights are called that are stored as integers


def check_agreement(plan: Plan, models: Sequence[Checkpoint], setting: Setting) -> None:
    """Read the tensors that no rule may change, and both spellings of tied ones; few models have any that are large.

    CheckpointError for those that differ.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(Reader(model))) for model in models]
        for job in plan.jobs:
            for model, name in job.of_experts if isinstance(job, Keep) and not job.largest else ():
                if not _same(readers, job, (0, job.name), (model, name)):
                    raise differs_from_base(job, setting.who(model))
            for model, copy in job.copies:
                if not _same(readers, job, (model, job.first_spelling(model)), (model, copy)):
                    raise differ_though_tied(job, model, copy, setting.who(model))


def differs_from_base(job: Job, who: str) -> CheckpointError:
    what = f"integer tensor {job.name!r} differs from the base's"
    return CheckpointError(who, what, UNQUANTISED if _QUANTISED.search(job.name) else keep_apart(job.name))


def differ_though_tied(job: Job, model: int, copy: str, who: str) -> CheckpointError:
    """The error of a model, the base or an expert by its number, whose tied tensor has other values as `copy`.

    A configuration can tell a head apart from its embedding; other names of one parameter it cannot.
    """
    first = job.first_spelling(model)
    kinds = {role_by_name(replace(job.spec, name=name), conv1d=False).name for name in (first, copy)}
    cure: str | Cure = keep_apart(job.name) if model else fetching("it again, or save it with one of the two")
    if kinds == {"embedding", "output_head"}:
        cure = "set tie_word_embeddings to false in its config.json"
        cure += "; of an adapter, merge it into its base with peft first" if model else ""
    return CheckpointError(who, f"tensors {first!r} and {copy!r} should be tied but differ", cure)


def _same(readers: Sequence[Reader], job: Job, one: Input, other: Input) -> bool:
    rows = job.spec.shape[0] if job.spec.shape else 0
    step = max(1, _BLOCK * rows // max(1, job.spec.nbytes)) if rows else 0
    parts: Iterator[tuple[int, int] | None] = (
        ((first, min(first + step, rows)) for first in range(0, rows, step)) if rows else iter((None,))
    )
    return all(torch.equal(_bytes(readers, one, part), _bytes(readers, other, part)) for part in parts)


def _bytes(readers: Sequence[Reader], wanted: Input, rows: tuple[int, int] | None) -> Tensor:
    model, name = wanted
    places = readers[model].places([Span(name, rows)])
    (stored,) = readers[model].read(places, torch.empty(places.nbytes, dtype=torch.uint8))
    return stored.tensor().contiguous().view(-1).view(torch.uint8)
