"""Layers by their numbers: names that have one, and models whose layers are those of others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acemerge.errors import CheckpointError

_LAYER = re.compile(r"^((?:[^.]*\.)*?)(\d+)\.")
_TOWER = re.compile(r"(^|\.)(layers?|h|blocks?)\.$")  # what holds the layers of a tower
# Of what belongs to no layer: these come before the first one, all else behind the last.
_BEFORE = re.compile(r"embed|(^|\.)w[tp]e\.")
_DEPTHS = {"num_hidden_layers", "n_layer", "num_layers", "n_layers"}
_PER_LAYER = re.compile(r"layer|pattern|block")
_NUMBERS = re.compile(r"(layers|layer_ids|layer_idx|layer_indices)$")


def split_layer(name: str) -> tuple[str, int] | None:
    """What is before the layer's number in a tensor's name, and the number: the first part of the name that is one.
    None for what belongs to no layer.
    """
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else None


def layer_number(name: str) -> int | None:
    found = split_layer(name)
    return None if found is None else found[1]


def places_in_layers(names: Collection[str]) -> dict[str, str]:
    """Each tensor's place within its layer: its name without the number, and without what is before that where all
    share it. What belongs to no layer keeps its name.
    """
    found = {name: split_layer(name) for name in names}
    before = {layer[0] for layer in found.values() if layer}
    places = {}
    for name, layer in found.items():
        if layer is None:
            places[name] = name
            continue
        prefix, number = layer
        rest = name[len(f"{prefix}{number}.") :]
        places[name] = rest if len(before) == 1 else f"{prefix}{rest}"
    return places


def tower_layer(name: str) -> tuple[str, int] | None:
    """`split_layer` what belongs to a tower of layers; None for other parts that are numbered, as a head's."""
    found = split_layer(name)
    return found if found and _TOWER.search(found[0]) else None


@dataclass(frozen=True)
class Layers:
    """The layers `first`, `first + 1`, ... of a model with these tensors, so many as a slice of the output has."""

    names: Collection[str]
    first: int


@dataclass(frozen=True)
class LayerStack:
    """A model whose layers are slices of others', one behind the other: `lengths` says how many layers each has.

    What comes before the layers, as an embedding, is the first slice's, and what comes behind them the last one's.
    """

    lengths: tuple[int, ...]

    @property
    def depth(self) -> int:
        return sum(self.lengths)

    def slice_of(self, name: str) -> tuple[int, int | None]:
        """The slice that a tensor of the output is in, and its layer's number there if it belongs to one."""
        found = tower_layer(name)
        if found is None:
            return (0 if _BEFORE.search(name) else len(self.lengths) - 1), None
        left = found[1]
        for i, length in enumerate(self.lengths):
            if left < length:
                return i, left
            left -= length
        raise AssertionError(f"{name} is beyond layer {self.depth}")

    def names(self, parts: Sequence[Layers | None]) -> Iterator[tuple[str, int, str]]:
        """The output's tensors that are made of `parts`, one of each slice: name, number of the part, name there."""
        first = 0
        for i, (part, length) in enumerate(zip(parts, self.lengths, strict=True)):
            for name in part.names if part else ():
                found = tower_layer(name)
                if found is None:
                    if self.slice_of(name)[0] == i:
                        yield name, i, name
                elif part and part.first <= found[1] < part.first + length:
                    prefix, number = found
                    rest = name[len(f"{prefix}{number}") :]
                    yield f"{prefix}{number - part.first + first}{rest}", i, name
            first += length


def depth_of(names: Iterable[str], where: object) -> int:
    """How many layers a model has. CheckpointError where it has none, or more than one tower of them."""
    found = [layer for name in names if (layer := tower_layer(name))]
    towers = sorted({prefix for prefix, _ in found})
    if len(towers) != 1:
        what = f"has layers under {' and '.join(towers)}" if towers else "has no numbered layers"
        raise CheckpointError(where, f"{what}: slices are of models with one tower", "merge the models whole")
    return 1 + max(number for _, number in found)


LayerOrigin = tuple[Mapping[str, Any], int]  # of a layer: the configuration of its model, and its number there


def stacked_config(config: Mapping[str, Any], origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """A configuration for the layers of `origins`.

    The count of layers follows, and so do lists with an entry per layer and lists of layers by their numbers.
    """
    inner = [(own["text_config"], i) for own, i in origins if isinstance(own.get("text_config"), dict)]
    if "text_config" in config and len(inner) == len(origins) and not _DEPTHS & config.keys():
        return {**config, "text_config": stacked_config(config["text_config"], inner)}
    made = dict(config)
    for key, value in config.items():
        if key in _DEPTHS and isinstance(value, int):
            made[key] = len(origins)
        elif isinstance(value, list) and _PER_LAYER.search(key):
            made[key] = _stacked_list(key, value, origins)
    return made


def _stacked_list(key: str, value: list[Any], origins: Sequence[LayerOrigin]) -> list[Any]:
    lists = [(own[key], i, _depth(own)) for own, i in origins if isinstance(own.get(key), list)]
    if len(lists) < len(origins):
        return value
    numbers = bool(_NUMBERS.search(key)) and all(type(i) is int for own, _, _ in lists for i in own)
    all_named = numbers and all(own == list(range(depth)) for own, _, depth in lists)
    if not all_named and all(len(own) == depth > i for own, i, depth in lists):
        return [own[i] for own, i, _ in lists]
    return [layer for layer, (own, i, _) in enumerate(lists) if i in own] if numbers else value


def _depth(config: Mapping[str, Any]) -> int:
    return next((config[key] for key in sorted(_DEPTHS) if isinstance(config.get(key), int)), 0)
