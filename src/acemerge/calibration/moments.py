"""Second moments of the inputs of a network's layers: running sums over batches, never the inputs themselves."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from acemerge.calibration.feed import Feed, open_feed
from acemerge.calibration.hooks import ParameterSlice, TappedLayer, input_entries, parameter_slices, watching
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import NumericalError
from acemerge.linalg.device import each_with_host
from acemerge.linalg.gram import symmetric_product
from acemerge.shapes import Float, Tensor
from acemerge.tasks.networks import Model, open_model
from acemerge.tasks.own_text import OwnText
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE, SMALLER_TASKS, taking_examples
from acemerge.tasks.task_file import Task

_LIMIT = 4 << 30  # bytes of sums that are kept at once: the data is run again for those that find no room
OnExamples = Callable[[int, int], None]  # told how many examples are done, of how many


@dataclass(frozen=True)
class Moment:
    """`sum Z^T Z` (in, in) of a layer's inputs and how many rows they were; of a stack (E, in, in), one each."""

    total: Float[Tensor, "*stack in in"]
    rows: Float[Tensor, "*stack"]

    @property
    def mean(self) -> Float[Tensor, "*stack in in"]:
        """`Z^T Z / N`, zero where there were no rows."""
        return self.total / self.rows.clamp(min=1)[..., None, None]

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.rows + other.rows)


@dataclass
class InputSums:
    """Sums over all inputs that it is told of: each product in float32 or wider, their sum in float64."""

    totals: dict[TappedLayer, Tensor] = field(default_factory=dict)
    rows: dict[TappedLayer, int] = field(default_factory=dict)
    _last: tuple[Tensor, int, Tensor] | None = None  # an input, its version and its product

    def see(self, layer: TappedLayer, inputs: Tensor) -> None:
        """Add inputs (..., in). Layers that are given one and the same tensor in turn share its product."""
        if self._last is None or self._last[0] is not inputs or self._last[1] != inputs._version:
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._last = inputs, inputs._version, symmetric_product(wide)
        product = self._last[2]
        if layer not in self.totals:
            self.totals[layer], self.rows[layer] = torch.zeros_like(product, dtype=torch.float64), 0
        self.totals[layer] += product
        self.rows[layer] += inputs.numel() // max(1, inputs.shape[-1])

    def moment(self, place: ParameterSlice, stack: int | None) -> Moment | None:
        """Of the layer at a place, or of all in a stack of so many; None where nothing was seen there.

        An expert of a stack that no row was sent to has zeros.
        """
        slices = [place.slice or 0] if stack is None else list(range(stack))
        any_seen = next((self.totals[layer] for layer in self.totals if layer[0] == place.parameter), None)
        if any_seen is None:
            return None
        keys = [(place.parameter, i) for i in slices]
        totals = torch.stack([self.totals.get(key, torch.zeros_like(any_seen)) for key in keys])
        rows = torch.tensor([self.rows.get(key, 0) for key in keys], dtype=torch.float64).to(totals.device)
        return Moment(totals, rows) if stack is not None else Moment(totals[0], rows[0])


class SeenEnough(Exception):  # noqa: N818
    """Raised by whoever sees the inputs: the rest of the network need not be run."""


def run_through(feed: Feed, on_examples: OnExamples = lambda *_: None) -> None:
    """All examples once through the network, forward only, or as far as is wanted."""
    done = 0
    with torch.no_grad():
        for rows in feed.batches():
            with contextlib.suppress(SeenEnough), reported(feed):
                if not feed.forward(rows).isfinite().all():
                    what = "the model's scores are not finite"
                    raise NumericalError("calibration", what, ARE_WEIGHTS_FINITE)
            done += len(rows)
            on_examples(done, len(feed.lengths))


def reported(feed: Feed) -> contextlib.AbstractContextManager[None]:
    """What the network raises for examples that it cannot be given, in words."""
    return taking_examples("calibration", next(feed.network.parameters()).device, SMALLER_TASKS)


def second_moments(
    model: Model,
    tasks: Sequence[Task | OwnText],
    tensors: Mapping[str, TensorSpec],
    on_examples: OnExamples = lambda *_: None,
) -> Iterator[tuple[str, Moment]]:
    """The moments of these weights' inputs over all of the tasks' examples, those that fit in memory together.

    A weight whose inputs are not seen is left out: one that is no linear layer, or is not run on this data.
    """
    waiting = list(tensors)
    while waiting:
        group: list[str] = []
        found: dict[str, Moment] = {}
        for task in tasks:
            feed, sums = open_feed(model, task, labelled=False), InputSums()
            at = parameter_slices(feed.network, tensors)
            if not group:
                entries = {name: input_entries(feed.network, at[name]) if name in at else 0 for name in waiting}
                group = first_that_fit(entries)
            watched = {name: at[name] for name in group if name in at}
            with watching(feed.network, {place.parameter for place in watched.values()}, sums.see):
                run_through(feed, on_examples)
            for name, moment in moments_at(watched, tensors, sums):
                found[name] = found[name] + moment if name in found else moment
        yield from found.items()
        waiting = waiting[len(group) :]


def moments_at(
    at: Mapping[str, ParameterSlice], tensors: Mapping[str, TensorSpec], sums: InputSums
) -> Iterator[tuple[str, Moment]]:
    for name, place in at.items():
        shape = tensors[name].shape
        moment = sums.moment(place, shape[0] if len(shape) == 3 else None)
        if moment is not None:
            yield name, moment


def first_that_fit(entries: Mapping[str, int]) -> list[str]:
    """The first of these names whose sums, of so many entries in float64, fit in memory together; one at least."""
    held = list(itertools.accumulate(8 * count for count in entries.values()))
    return list(entries)[: max(1, bisect.bisect_right(held, _LIMIT))]


def input_second_moments(
    model: str | Path, task: Task | Iterable[Task], device: str = "cpu", layers: Iterable[str] | None = None
) -> Iterator[tuple[str, Float[Tensor, "*stack in in"]]]:
    """The second moments `Z^T Z / N` of the inputs of a model's linear layers on a task's data, layer by layer.

    Args:
        model: a folder that `from_pretrained` loads, or a Hub id.
        task: one of those that `acemerge.tasks.task_file.load_tasks(path, labelled=False)` reads, or several.
        device: where the network runs.
        layers: names of weights in the model's files; all matrices where absent.

    Yields (name, moment), float64, with N the rows (tokens, patches) that entered the layer; of fused experts, stored
    as (E, out, in), one moment each (E, in, in). Layers whose inputs are not seen are left out. The sums are streamed:
    no input is kept, and where all sums together are more than 4 GB the data is run several times.

    Raises UsageError, CheckpointError where data and model do not go together.
    """
    opened = open_model(str(model), torch.device(device))
    wanted = None if layers is None else set(layers)
    specs = {
        name: spec
        for name, spec in opened.checkpoint.tensors.items()
        if len(spec.shape) in (2, 3) and (wanted is None or name in wanted)
    }
    tasks: list[Task | OwnText] = [task] if isinstance(task, Task) else list(task)
    for name, moment in each_with_host(second_moments(opened, tasks, specs), opened.device):
        yield name, moment.mean
