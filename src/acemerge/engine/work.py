"""What a computation is given: the recipe's setting, the inputs of its pieces, a place to work in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from acemerge.engine.buffers import Buffers
from acemerge.engine.unfolding import as_seen
from acemerge.linalg.known import Known
from acemerge.methods import Calibration, Layer, check_experts, expert_seeds
from acemerge.planning.jobs import AnyJob, ByRule, Input
from acemerge.planning.pieces import Piece
from acemerge.recipes.recipe import Recipe
from acemerge.shapes import Tensor

Result = TypeVar("Result")


class Measured(Protocol):
    """What was measured of the experts on data of their own."""

    def of(self, wanted: Calibration, tensor: str, experts: Sequence[int]) -> Tensor | None:
        """One measurement of a tensor for each of the experts, as `Needs.calibration` says; None if one lacks it."""
        ...


@dataclass(frozen=True)
class Setting:
    """What every job of a run shares.

    `thresholds` holds, by a job's `pool`, for each rule of the recipe that keeps a share of its tensors, one magnitude
    per expert. `measured` has what was measured on calibration data, where rules want it.
    """

    recipe: Recipe
    labels: Sequence[str]
    thresholds: Mapping[int, Sequence[float]] = field(default_factory=dict)
    measured: Measured | None = None

    def who(self, model: int) -> str:
        """What an error calls a model: by itself, in a conversion, it is nobody's base."""
        if model:
            return f"expert {self.labels[model - 1]}"
        return "base" if self.labels else self.recipe.base

    def layer(self, job: ByRule, used: Sequence[int], device: torch.device) -> Layer:
        """What the job's rule may know beside the updates of these experts, but for the base.

        UsageError where the rule is not defined for them.
        """
        weights, keep = [job.weights[i] for i in used], job.method.needs.keep
        check_experts(job.method, weights)
        thresholds = None if keep is None else tuple(self.thresholds[job.pool][i] for i in used)
        factors = torch.tensor(weights, dtype=torch.float64).to(device)
        moments = self._moments(job, used)
        moments = None if moments is None else moments.to(device)
        return Layer(factors, expert_seeds(self.recipe.seed, job.name, used), thresholds, moments=moments)

    def _moments(self, job: ByRule, used: Sequence[int]) -> Tensor | None:
        """As the job's rule sees its layer."""
        wanted = job.method.needs.calibration
        found = None if wanted is None or self.measured is None else self.measured.of(wanted, job.name, used)
        return as_seen(job, found) if found is not None and wanted == "gradients" else found


class Values(Protocol):
    """The inputs of one piece."""

    def take(self, wanted: Input) -> Tensor:
        """The stored values, on any device. Not to be modified."""
        ...

    def release(self, model: int) -> None:
        """Nothing more is wanted of this model."""
        ...


class Common:
    """What the rules on one piece have in common: its task vectors, and what is known of these."""

    def __init__(self) -> None:
        self.known = Known()
        self._updates: dict[Hashable, Any] = {}
        self._spaces = contextlib.ExitStack()

    def updates(self, decided_by: Hashable, make: Callable[[], contextlib.AbstractContextManager[Result]]) -> Result:
        """What `make` gives, held until the end; made once for what it is decided by."""
        if decided_by not in self._updates:
            self._updates[decided_by] = self._spaces.enter_context(make())
        found: Result = self._updates[decided_by]
        return found

    def close(self) -> None:
        self.known, self._updates = Known(), {}
        self._spaces.close()


@dataclass(frozen=True)
class Place:
    """Where a piece is computed: the device, the host's large buffers, and what it has in common with others there."""

    device: torch.device
    buffers: Buffers = field(default_factory=Buffers)
    common: Common | None = None

    @contextlib.contextmanager
    def in_common(self) -> Iterator[Place]:
        """The same place for several rules on one piece."""
        with contextlib.closing(Common()) as common:
            yield replace(self, common=common)

    @contextlib.contextmanager
    def space(self, shape: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor to work in, whatever is in it; not to be used when the block has ended."""
        if self.device.type != "cpu":
            yield torch.empty(shape, dtype=dtype, device=self.device)
            return
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = self.buffers.take(nbytes)
        try:
            yield buffer[:nbytes].view(dtype).view(*shape)
        finally:
            self.buffers.give(buffer)


# Pieces that are worked on together, each with its inputs.
Loaded = Sequence[tuple[Piece[AnyJob], Values]]
Work = Callable[[Loaded[AnyJob], Place], Result]  # what a walk does with them


class Walk(Protocol):
    """Goes through pieces in their order, some together, and yields what `work` makes of them."""

    def __call__(self, parts: Iterable[Piece[AnyJob]], work: Work[AnyJob, Result]) -> Generator[Result, None, None]: ...
