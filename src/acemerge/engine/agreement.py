"""What must be the same in several places, compared before anything is merged: a plan finds what a merge refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.reader import Reader, Span
from acemerge.engine.work import Setting
from acemerge.errors import CheckpointError
from acemerge.planning.jobs import Input, Job, Keep, Plan
from acemerge.planning.planner import keep_apart
from acemerge.shapes import Tensor

_BLOCK = 32 << 20  # bytes of a tensor that are compared at once


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
                first = job.first_spelling(model)
                if not _same(readers, job, (model, first), (model, copy)):
                    raise differ_though_tied(first, copy, setting.who(model), expert=model > 0)


def differs_from_base(job: Job, who: str) -> CheckpointError:
    what = f"integer tensor {job.name!r} differs from the base's"
    return CheckpointError(
        who, what, "dequantise the models first" if len(job.spec.shape) > 1 else keep_apart(job.name)
    )


def differ_though_tied(first: str, copy: str, who: str, expert: bool) -> CheckpointError:
    what = f"tensors {first!r} and {copy!r} should be tied but differ"
    cure = "set tie_word_embeddings to false in its config.json"
    cure += "; of an adapter, merge it into its base with peft first" if expert else ""
    return CheckpointError(who, what, cure)


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
