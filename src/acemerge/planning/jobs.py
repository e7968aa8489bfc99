"""A plan is data: one job per tensor of the output, and the pieces in which a job may be done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from acemerge.checkpoints.adapter import Adapter, Update
from acemerge.checkpoints.header import TensorSpec
from acemerge.methods import Method, keeps_low_rank
from acemerge.models.projections import Fused
from acemerge.models.roles import Role
from acemerge.models.vocabulary import Vocabulary
from acemerge.recipes.recipe import Recipe

OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Entries of all models together in one piece: few enough to be one thread's work while others do theirs.
_PIECE = 1 << 23
# So few that calling for the work takes as long as the work.
_TINY = 1 << 18

Load = Literal["tiny", "medium", "large"]


class Source(Protocol):
    """A model as a plan sees it: names, shapes and types. What an adapter does not name is the base's own."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def adapter(self) -> Adapter | None: ...
    @property
    def float8(self) -> str: ...
    @property
    def absent(self) -> frozenset[str]: ...


def is_whole(source: Source) -> bool:
    """Whether a model has all of its tensors, and not only updates of the base's."""
    return source.adapter is None or source.adapter.on_a_model


# A tensor of one of the models: its number, 0 for the base and i + 1 for the i-th expert, and its name there.
Input = tuple[int, str]


@dataclass(frozen=True)
class Job:
    """One tensor of the output: what it is, which rule makes it and why.

    `weights` are the experts' in the rule. `sources[i]` is the tensor's name in the i-th expert, empty where it has
    none of its own and starts from the base's; `updates[i]` is what an adapter adds to that. `absent` are the numbers
    of the experts that have no say in it. `copies` are further spellings of a tied tensor, whose bytes must agree.
    `entrywise`: every entry of the result depends on the same entry of the inputs alone. `fused`: projections that the
    rule gets one by one. `vocabulary`: which rows of the experts are which of the output. `widens`: inputs in fp8 are
    float32 in memory of their own when they are taken. `factors`: where the output is an adapter, the A and B that it
    holds of this tensor, none where it cannot; None where the tensor itself is stored.
    `bytes_in` are those of all inputs, `compute_dtype` is the type of the work.
    """

    spec: TensorSpec
    role: Role
    reason: str
    method: Method | None = None
    weights: tuple[float, ...] = ()
    transposed: bool = False
    sources: tuple[str, ...] = ()
    updates: tuple[Update | None, ...] = ()
    must_agree: bool = False
    copies: tuple[Input, ...] = ()
    entrywise: bool = False
    fused: Fused | None = None
    vocabulary: Vocabulary | None = field(default=None, compare=False)
    absent: frozenset[int] = frozenset()
    widens: bool = False
    factors: tuple[TensorSpec, ...] | None = None
    bytes_in: int = 0
    compute_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def rule(self) -> str:
        return self.method.name if self.method else "base"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What the output holds of it."""
        return (self.spec,) if self.factors is None else self.factors

    @property
    def makes_masks(self) -> bool:
        return self.method is not None and self.method.needs.masks

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Every tensor that the job reads, the base's own first."""
        factors = tuple((i, f.name) for i, update in enumerate(self.updates, 1) if update for f in update.factors)
        return (*self.of_its_shape, *factors)

    @cached_property
    def of_its_shape(self) -> tuple[Input, ...]:
        """Those that are no factors."""
        experts = tuple((i, name) for i, name in enumerate(self.sources, 1) if name)
        return ((0, self.name), *experts, *self.copies)

    @cached_property
    def factored(self) -> bool:
        """Whether all that the experts change is given by factors, and these are what is merged.

        A rule that looks at the input side has to see them, to know whether the experts share it.
        """
        given = any(self.updates) and not any(self.sources) and not any(u and u.magnitude for u in self.updates)
        given = given and not self.absent and len(self.spec.shape) == 2
        return self.method is not None and given and (self.method.needs.input_side or self._low_rank_pays)

    @property
    def keeps_low_rank(self) -> bool:
        """Whether no task vector is formed."""
        return self.factored and self._low_rank_pays

    @property
    def _low_rank_pays(self) -> bool:
        assert self.method is not None
        _, rows, columns = self.matrices
        parts = [self.fused.groups * size for size in self.fused.sizes] if self.fused else [rows]
        return all(keeps_low_rank(self.method.needs, self.rank, (part, columns)) for part in parts)

    @property
    def rank(self) -> int:
        """Of all updates together that are given by factors."""
        return sum(update.rank for update in self.updates if update)

    @property
    def own_weights(self) -> tuple[float, ...]:
        """Of the experts that have a say in it."""
        return tuple(weight for i, weight in enumerate(self.weights) if i not in self.absent)

    @property
    def models(self) -> int:
        """The base and the experts, and further copies: so many tensors of its shape are worked with."""
        return 1 + (0 if self.keeps_low_rank else len(self.sources)) + len(self.copies)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(slices, out, in) of the matrices that the rule sees."""
        shape = self.spec.shape
        if len(shape) < 2:
            return 1, 1, math.prod(shape)
        rows, columns = (shape[-1], shape[-2]) if self.transposed else (shape[-2], shape[-1])
        return math.prod(shape[:-2]), rows, columns


@dataclass(frozen=True)
class Piece:
    """A job, or a range of its tensor's rows."""

    job: Job
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.job.spec.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_in(self) -> int:
        return self.job.bytes_in * self.count // max(1, self.job.spec.count)

    @property
    def load(self) -> Load:
        """How to compute it. Known from the piece alone: its bits may depend on how many threads do it."""
        return "tiny" if self._entries <= _TINY else "medium" if self._entries <= _PIECE else "large"

    @property
    def stack(self) -> int:
        """How many pieces like this one may be worked on at once: as many as are small together."""
        return max(1, _TINY // max(1, self._entries))

    @property
    def _entries(self) -> int:
        """Of all models together."""
        return self.count * self.job.models

    @property
    def is_last(self) -> bool:
        return self.rows is None or self.rows[1] == self.job.spec.shape[0]


def pieces(job: Job, split: bool) -> Iterator[Piece]:
    """The job in ranges of rows if it is to be split and larger than one range, else in one piece."""
    # Factors are no rows of the tensor.
    rows = job.spec.shape[0] if split and job.spec.shape and not any(job.updates) else 0
    step = max(1, _PIECE // (job.models * max(1, job.spec.count // max(1, rows))))
    if rows <= step:
        yield Piece(job)
        return
    for first in range(0, rows, step):
        yield Piece(job, (first, min(first + step, rows)))


@dataclass(frozen=True)
class Head:
    """A tensor of one expert that is not merged but written beside the model."""

    spec: TensorSpec
    reason: str


@dataclass(frozen=True)
class Plan:
    """The jobs in the order of the base's tensors, and each expert's own heads."""

    recipe: Recipe
    experts: tuple[str, ...]
    jobs: tuple[Job, ...]
    heads: tuple[tuple[Head, ...], ...]
    roles_source: str
    warnings: tuple[str, ...]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # of the experts that are
    dequantized: Mapping[str, str] = field(default_factory=dict)  # the models with weights in fp8, and what they have
    calibration: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # each expert's tasks, where rules ask

    @property
    def is_adapter(self) -> bool:
        """Whether the output is one."""
        return self.recipe.as_lora is not None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """How tokens were matched, where they were."""
        return next((job.vocabulary for job in self.jobs if job.vocabulary), None)

    @property
    def bytes_read(self) -> int:
        """Of tensors; a rule that keeps a share of the whole model reads them twice more, see `bytes_reread`."""
        return sum(job.bytes_in for job in self.jobs) + self._head_bytes

    @property
    def bytes_reread(self) -> int:
        return 2 * sum(job.bytes_in for job in self.jobs if job.method and job.method.needs.keep is not None)

    @property
    def bytes_written(self) -> int:
        return sum(spec.nbytes for job in self.jobs for spec in job.stored) + self._head_bytes

    @property
    def _head_bytes(self) -> int:
        return sum(head.spec.nbytes for expert in self.heads for head in expert)
