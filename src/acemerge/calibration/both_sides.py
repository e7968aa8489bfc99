"""K-FAC's two factors of every layer: second moments of its inputs, and of the gradients at its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from acemerge.calibration.feed import open_feed
from acemerge.calibration.hooks import ParameterSlice, parameter_slices, watching, watching_gradients
from acemerge.calibration.moments import InputSums, Moment, OnExamples, first_that_fit, reported
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import NumericalError
from acemerge.shapes import Float, Tensor
from acemerge.tasks.networks import Model
from acemerge.tasks.own_text import OwnText
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE
from acemerge.tasks.task_file import Task


def both_second_moments(
    model: Model,
    tasks: Sequence[Task | OwnText],
    tensors: Mapping[str, TensorSpec],
    on_examples: OnExamples = lambda *_: None,
) -> Iterator[tuple[str, Float[Tensor, " n"]]]:
    """`Z^T Z / N` of the inputs and `G^T G / N` of the gradients at the outputs, one after the other, in float64.

    The gradients are of the log likelihood of answers drawn from the model itself, example by example; N counts rows.
    A weight that is no linear layer's, or is not run on this data, is left out.
    """
    waiting = {name: spec.shape[0] ** 2 + spec.shape[1] ** 2 for name, spec in tensors.items() if len(spec.shape) == 2}
    while waiting:
        names = first_that_fit(waiting)
        inputs, gradients = InputSums(), InputSums()
        at: dict[str, ParameterSlice] = {}
        for task in tasks:
            at = _run(model, task, {name: tensors[name] for name in names}, (inputs, gradients), on_examples)
        for name, place in at.items():
            found = inputs.moment(place, None), gradients.moment(place, None)
            if found[0] is not None and found[1] is not None:
                yield name, _joined(name, found[0], found[1])
        waiting = {name: count for name, count in waiting.items() if name not in names}


def _run(
    model: Model,
    task: Task | OwnText,
    tensors: Mapping[str, TensorSpec],
    sums: tuple[InputSums, InputSums],
    on_examples: OnExamples,
) -> dict[str, ParameterSlice]:
    """All of the task's examples, and where the tensors are in its network."""
    feed = open_feed(model, task, labelled=False)
    feed.network.requires_grad_(False)
    at = {name: place for name, place in parameter_slices(feed.network, tensors).items() if place.slice is None}
    parameters = {place.parameter for place in at.values()}
    with (
        watching(feed.network, parameters, sums[0].see),
        watching_gradients(feed.network, parameters, sums[1].see),
    ):
        for i in range(len(feed.lengths)):
            with reported(feed):
                likelihood = feed.drawn_log_likelihood(i)
                if likelihood.requires_grad:  # else no watched layer is run on this data
                    likelihood.backward()
            on_examples(i + 1, len(feed.lengths))
    return at


def _joined(name: str, inputs: Moment, gradients: Moment) -> Float[Tensor, " n"]:
    found = torch.cat([inputs.mean.flatten(), gradients.mean.flatten()])
    if not found.isfinite().all():
        what = f"the inputs or gradients of tensor {name!r} are not finite"
        raise NumericalError("calibration", what, ARE_WEIGHTS_FINITE)
    return found
