"""A plan is data: one job per tensor of the output, that says what becomes of it and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from acemerge.checkpoints.adapter import Adapter, Update
from acemerge.checkpoints.header import TensorSpec
from acemerge.methods import Method, keeps_low_rank
from acemerge.models.projections import Fused
from acemerge.models.roles import LAYERS, Role
from acemerge.models.vocabulary import Vocabulary
from acemerge.recipes.recipe import Recipe

OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelHeader(Protocol):
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


def is_whole(source: ModelHeader) -> bool:
    """Whether a model has all of its tensors, and not only updates of the base's."""
    return source.adapter is None or source.adapter.on_a_model


# A tensor of one of the models: its number, 0 for the base and i + 1 for the i-th expert, and its name there.
Input = tuple[int, str]


@dataclass(frozen=True)
class _Tensor:
    """What is told of every tensor of the output: what it is, why it becomes what it does, and what is read for it.

    `sources[i]` is the tensor's name in the i-th expert, empty where it has none of its own and starts from the base's.
    `copies` are further spellings of a tied tensor, whose bytes must agree. `widens`: inputs in fp8 are float32 in
    memory of their own when they are taken. `bytes_in` are those of all inputs, of what others share its part,
    `compute_dtype` is the type of the work.
    """

    spec: TensorSpec
    role: Role
    reason: str
    sources: tuple[str, ...] = ()
    copies: tuple[Input, ...] = ()
    widens: bool = False
    bytes_in: int = 0
    compute_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.spec.name

    def first_spelling(self, model: int) -> str:
        """What a model calls the tensor of which it has further copies."""
        return self.sources[model - 1] if model else self.name

    @cached_property
    def of_experts(self) -> tuple[Input, ...]:
        """The experts' own tensors."""
        return tuple((i, name) for i, name in enumerate(self.sources, 1) if name)

    @cached_property
    def of_its_shape(self) -> tuple[Input, ...]:
        """Every tensor that is read and is no factor, the base's own first."""
        return ((0, self.name), *self.of_experts, *self.copies)


@dataclass(frozen=True, kw_only=True)
class _ByRule(_Tensor):
    """A tensor that a rule makes.

    `weights` are the experts' in the rule, `absent` the numbers of those that have no say. `transposed`: the rule gets
    it the other way round than it is stored. `pool`: the rule of the recipe by its number, over whose tensors a share
    of the whole model is taken. `groups`: of a convolution that the rule gets as a matrix for each of so many groups.
    """

    method: Method
    weights: tuple[float, ...]
    absent: frozenset[int] = frozenset()
    transposed: bool = False
    pool: int = -1
    groups: int = 0

    @property
    def rule(self) -> str:
        return self.method.name

    @property
    def makes_masks(self) -> bool:
        return self.method.needs.masks

    @property
    def own_weights(self) -> tuple[float, ...]:
        """Of the experts that have a say in it."""
        return tuple(weight for i, weight in enumerate(self.weights) if i not in self.absent)

    @cached_property
    def unfolded(self) -> tuple[int, ...]:
        """The shape in which the rule gets it, but for being transposed: a convolution as a layer of patches."""
        shape = self.spec.shape
        if not self.groups:
            return shape
        matrix = (shape[0] // self.groups, math.prod(shape[1:]))
        return matrix if self.groups == 1 else (self.groups, *matrix)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(slices, out, in) of the matrices that the rule sees."""
        shape = self.unfolded
        if len(shape) < 2:
            return 1, 1, math.prod(shape)
        rows, columns = (shape[-1], shape[-2]) if self.transposed else (shape[-2], shape[-1])
        return math.prod(shape[:-2]), rows, columns


@dataclass(frozen=True, kw_only=True)
class Keep(_Tensor):
    """The base's own tensor. Experts that are named, as for an integer buffer, must have the same; `largest`: of a
    counter of steps the largest of all.
    """

    largest: bool = False

    rule: ClassVar[str] = "base"
    makes_masks: ClassVar[bool] = False
    entrywise: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.of_its_shape

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


@dataclass(frozen=True, kw_only=True)
class Merge(_ByRule):
    """A tensor of the same shape in all models, merged by a rule.

    `updates[i]` is what an adapter adds to the i-th expert's own. `entrywise`: every entry of the result depends on the
    same entry of the inputs alone. `fused`: projections that the rule gets one by one. `joined`: projections that it
    gets as one weight, this one among them, in their order; each job computes them all and stores its own rows.
    `factors`: where the output is an adapter, the A and B that it holds of this tensor, none where it cannot; None
    where the tensor itself is stored.
    """

    updates: tuple[Update | None, ...] = ()
    entrywise: bool = False
    fused: Fused | None = None
    joined: tuple[Merge, ...] = ()
    factors: tuple[TensorSpec, ...] | None = None
    compressed: bool = False  # to the rank of the output, before the rule

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        factors = tuple((i, f.name) for i, update in enumerate(self.updates, 1) if update for f in update.factors)
        others = (part for part in self.joined if part.name != self.name)
        return (*self.of_its_shape, *factors, *(found for part in others for found in part.of_its_shape))

    @cached_property
    def as_one(self) -> Merge:
        """The weight that projections which are joined make together: its rows are theirs, in their order."""
        rows = sum(part.spec.shape[0] for part in self.joined)
        return replace(self, spec=replace(self.spec, shape=(rows, self.spec.shape[1])), joined=())

    def rows_of(self, name: str) -> slice:
        """Where a projection's rows lie in that weight."""
        sizes = {part.name: part.spec.shape[0] for part in self.joined}
        first = sum(size for other, size in list(sizes.items())[: list(sizes).index(name)])
        return slice(first, first + sizes[name])

    @cached_property
    def shared(self) -> Mapping[Input, TensorSpec]:
        """The factors that lie with those of other tensors: of all experts of a mixture, where this is one's matrix."""
        return {
            (i, factor.name): factor
            for i, update in enumerate(self.updates, 1)
            if update and update.stack and update.stack.number is not None
            for factor in update.factors
        }

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What the output holds of it."""
        return (self.spec,) if self.factors is None else self.factors

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer, a stack of such, or a convolution that its rule takes for one."""
        layer = self.role.name in LAYERS or self.groups > 0
        return layer and len(self.spec.shape) > 1 and self.spec.count > 0

    @cached_property
    def factored(self) -> bool:
        """Whether all that the experts change is given by factors, and these are what is merged.

        A rule that looks at the input side has to see them, to know whether the experts share it.
        """
        given = any(self.updates) and not any(self.sources) and not any(u and u.magnitude for u in self.updates)
        given = given and not self.absent and len(self.spec.shape) == 2
        return given and (self.compressed or self.method.needs.input_side or self._low_rank_pays)

    @property
    def keeps_low_rank(self) -> bool:
        """Whether no task vector is formed."""
        return self.factored and self._low_rank_pays

    @property
    def _low_rank_pays(self) -> bool:
        _, rows, columns = self.matrices
        parts = [self.fused.groups * size for size in self.fused.sizes] if self.fused else [rows]
        return all(keeps_low_rank(self.method.needs, self.rank, (part, columns)) for part in parts)

    @property
    def rank(self) -> int:
        """Of all updates together that are given by factors."""
        return sum(update.rank for update in self.updates if update)


@dataclass(frozen=True, kw_only=True)
class MergeByToken(_ByRule):
    """A tensor with a row per token, merged where the models' vocabularies differ.

    `vocabulary` says which rows of the experts are which of the output.
    """

    vocabulary: Vocabulary = field(compare=False)
    entrywise: ClassVar[bool] = False

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.of_its_shape

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


# One tensor of the output.
ByRule = Merge | MergeByToken
Job = Keep | ByRule
AnyJob = TypeVar("AnyJob", bound=Job)


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
    def ruled(self) -> tuple[ByRule, ...]:
        """The tensors that rules make."""
        return tuple(job for job in self.jobs if not isinstance(job, Keep))

    @property
    def merged(self) -> tuple[Merge, ...]:
        """Those that have the same rows in all models."""
        return tuple(job for job in self.ruled if isinstance(job, Merge))

    @property
    def by_token(self) -> tuple[MergeByToken, ...]:
        return tuple(job for job in self.ruled if isinstance(job, MergeByToken))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """How tokens were matched, where they were."""
        return next((job.vocabulary for job in self.by_token), None)

    @property
    def bytes_read(self) -> int:
        """Of tensors; a rule that keeps a share of the whole model reads them twice more, see `bytes_reread`."""
        return sum(job.bytes_in for job in self.jobs) + self._head_bytes

    @property
    def bytes_reread(self) -> int:
        return 2 * sum(job.bytes_in for job in self.ruled if job.method.needs.keep is not None)

    @property
    def bytes_written(self) -> int:
        return sum(spec.nbytes for job in self.jobs for spec in job.stored) + self._head_bytes

    @property
    def _head_bytes(self) -> int:
        return sum(head.spec.nbytes for expert in self.heads for head in expert)
