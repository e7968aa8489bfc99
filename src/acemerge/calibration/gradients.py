"""The diagonal of the empirical Fisher information: squared gradients of single examples, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from acemerge.calibration.feed import open_feed
from acemerge.calibration.hooks import parameter_slices
from acemerge.calibration.moments import OnExamples, first_that_fit, reported
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import NumericalError
from acemerge.shapes import Float, Tensor
from acemerge.tasks.networks import Model
from acemerge.tasks.own_text import OwnText
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE
from acemerge.tasks.task_file import Task


def squared_gradients(
    model: Model,
    tasks: Sequence[Task | OwnText],
    tensors: Mapping[str, TensorSpec],
    on_examples: OnExamples = lambda *_: None,
) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    """`F = mean_n (d log p(y_n | x_n) / d W)^2` over all of the tasks' examples, in float64, one backward pass each.

    A tensor that is no parameter of the network, or has no gradient, is left out.
    """
    waiting = {name: spec.count for name, spec in tensors.items()}
    while waiting:
        names = first_that_fit(waiting)
        totals: dict[str, Tensor] = {}
        count = 0
        for task in tasks:
            feed = open_feed(model, task, labelled=True)
            parameters = _parameters(feed.network, {name: tensors[name] for name in names})
            for i in range(len(feed.lengths)):
                feed.network.zero_grad(set_to_none=True)
                with reported(feed):
                    feed.log_likelihood(i).backward()
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        total = totals.setdefault(name, torch.zeros_like(parameter, dtype=torch.float64))
                        total += parameter.grad.double().square()
                on_examples(i + 1, len(feed.lengths))
            count += len(feed.lengths)
        for name, total in totals.items():
            if not total.isfinite().all():
                what = f"the gradients of tensor {name!r} are not finite"
                raise NumericalError("calibration", what, ARE_WEIGHTS_FINITE)
            yield name, total / count
        waiting = {name: count for name, count in waiting.items() if name not in names}


def _parameters(network: nn.Module, tensors: Mapping[str, TensorSpec]) -> dict[str, nn.Parameter]:
    """The parameters that are these tensors as a whole, and the only ones that get a gradient."""
    network.requires_grad_(False)
    own = dict(network.named_parameters(remove_duplicate=False))
    at = parameter_slices(network, tensors).items()
    found = {name: own[place.parameter] for name, place in at if place.slice is None and place.parameter in own}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found
