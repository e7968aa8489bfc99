"""Checkpoints whose layers are slices of other checkpoints' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from acemerge.checkpoints.folder import Checkpoint
from acemerge.errors import CheckpointError, UsageError
from acemerge.models.depth import Layers, LayerStack, depth_of, stacked_config
from acemerge.planning.jobs import is_whole
from acemerge.recipes.tables import SliceSpec

_MERGE_FIRST = "merge it into its model with peft first"


def as_sliced(
    slices: Sequence[SliceSpec], base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str]
) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The base and the experts as the recipe's slices have them: under the names of the output's layers.

    The base's layers may be of other models, whose files it then reads. An expert has no tensors where it is no part
    of a slice. Raises CheckpointError for a model without numbered layers, UsageError for layers that it does not
    have.
    """
    models, who = [base, *experts], ["base", *(f"expert {label}" for label in labels)]
    used = {part.base_from for part in slices} | {i for p in slices for i, own in enumerate(p.experts, 1) if own}
    for i in sorted(used):
        if not is_whole(models[i]):
            raise CheckpointError(who[i], "is an adapter, which has no layers of its own", _MERGE_FIRST)
    depths = {i: depth_of(models[i].tensors, who[i]) for i in sorted(used)}
    stack = LayerStack(tuple(part.length for part in slices))
    of_base: list[_Part] = [(part.base_from, part.base) for part in slices]
    of_experts: list[list[_Part]] = [[(i, p.experts[i - 1]) for p in slices] for i in range(1, len(models))]
    for i, layers in (part for parts in (of_base, *of_experts) for part in parts):
        if layers is not None and layers[1] > depths[i]:
            what = f"has no layer {layers[1] - 1}, only 0 to {depths[i] - 1}"
            raise UsageError("slices", f"{who[i]} {what}", "change the slice's range, mergekit's `layer_range`")
    origins = [(models[part.base_from].config, layer) for part in slices for layer in range(*part.base)]
    views = [_view(stack, parts, models, i) for i, parts in enumerate((of_base, *of_experts))]
    return replace(views[0], config=stacked_config(base.config, origins)), tuple(views[1:])


# The number of a model, and its layers; of an expert that is no part of a slice none.
_Part = tuple[int, tuple[int, int] | None]


def _view(stack: LayerStack, parts: Sequence[_Part], models: Sequence[Checkpoint], own: int) -> Checkpoint:
    """A model with the tensors of these parts, one for each slice, under the output's names.

    An expert's adapter goes with its layers; the base's are those of the models alone.
    """
    tensors, places, updates, prints = {}, {}, {}, dict(models[own].fingerprints)
    adapter = models[own].adapter
    fused = [name for name in adapter.updates if name not in models[own].tensors] if adapter else []
    if fused:
        what = f"its adapter changes {fused[0]!r}, which its model stores in parts"
        raise CheckpointError(str(models[own].path), what, _MERGE_FIRST)
    layers = [None if of is None else Layers(models[i].tensors, of[0]) for i, of in parts]
    for name, part, there in stack.names(layers):
        model = models[parts[part][0]]
        if there in model.places:
            places[name] = model.places[there]
        elif adapter is None:  # an adapter names it otherwise than its model
            continue
        tensors[name] = replace(model.tensors[there], name=name)
        prints |= model.fingerprints
        if adapter is not None and there in adapter.updates:
            updates[name] = adapter.updates[there]
            places |= {factor.name: model.places[factor.name] for factor in updates[name].factors}
    made = None if adapter is None else replace(adapter, updates=updates)
    return replace(models[own], tensors=tensors, places=places, fingerprints=prints, adapter=made)
