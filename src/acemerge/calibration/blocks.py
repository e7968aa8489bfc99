"""RegMean++: measuring block by block, behind the blocks that are merged already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from acemerge.calibration.feed import Feed, open_feed
from acemerge.calibration.hooks import ParameterSlice, TappedLayer, parameter_slices, watching
from acemerge.calibration.moments import InputSums, Moment, OnExamples, SeenEnough, moments_at, run_through
from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import UsageError
from acemerge.models.depth import split_layer
from acemerge.shapes import Tensor
from acemerge.tasks.networks import Model
from acemerge.tasks.own_text import OwnText
from acemerge.tasks.task_file import Task


def block_of(name: str) -> str:
    """The block of a tensor: `encoder.layer.3` of its name, else the layer itself."""
    layer = split_layer(name)
    return name.rpartition(".")[0] if layer is None else f"{layer[0]}{layer[1]}"


def block_order(model: Model, tasks: Sequence[Task | OwnText], tensors: Mapping[str, TensorSpec]) -> list[str]:
    """The blocks of these weights in the order in which the tasks' first examples enter them; the others are none."""
    order: dict[str, None] = {}
    for task in tasks:
        feed = open_feed(model, task, labelled=False)
        at = parameter_slices(feed.network, tensors)
        blocks = {place.parameter: block_of(name) for name, place in at.items()}

        def see(layer: TappedLayer, _: Tensor, blocks: Mapping[str, str] = blocks) -> None:
            order.setdefault(blocks[layer[0]])

        with torch.no_grad(), watching(feed.network, set(blocks), see):
            feed.forward(next(feed.batches())[:1])
    return list(order)


def block_moments(
    model: Model,
    tasks: Sequence[Task | OwnText],
    tensors: Mapping[str, TensorSpec],
    block: str,
    later: Sequence[str],
    merged: Mapping[str, Tensor],
    on_examples: OnExamples = lambda *_: None,
) -> dict[str, Moment]:
    """The moments of one block of an expert, with the `merged` values in its network in the place of its own.

    No example is run further than into one of the `later` blocks.
    """
    found: dict[str, Moment] = {}
    for task in tasks:
        feed, sums = open_feed(model, task, labelled=False), InputSums()
        at = parameter_slices(feed.network, tensors)
        own = {name: place for name, place in at.items() if block_of(name) == block}
        put(
            feed.network,
            merged,
            parameter_slices(feed.network, {n: TensorSpec(n, v.dtype, tuple(v.shape)) for n, v in merged.items()}),
        )
        stops = {place.parameter for name, place in at.items() if block_of(name) in later}
        _run_into(feed, {place.parameter for place in own.values()}, stops, sums, on_examples)
        for name, moment in moments_at(own, tensors, sums):
            found[name] = found[name] + moment if name in found else moment
    return found


def _run_into(feed: Feed, wanted: set[str], stops: set[str], sums: InputSums, on_examples: OnExamples) -> None:
    def see(layer: TappedLayer, inputs: Tensor) -> None:
        if layer[0] in stops:
            raise SeenEnough
        sums.see(layer, inputs)

    with watching(feed.network, wanted | stops, see):
        run_through(feed, on_examples)


def put(network: nn.Module, values: Mapping[str, Tensor], at: Mapping[str, ParameterSlice]) -> None:
    """Write merged tensors into a network; what it does not have is passed over."""
    state = network.state_dict()
    for name, place in at.items():
        if place.slice is not None:
            cure = "use regmean, which measures each expert's own network"
            raise UsageError("method regmean_pp", "cannot put fused experts back that are apart on disk", cure)
        state[place.parameter].copy_(values[name])
