"""Mixtures of experts of which one model has a matrix for each expert, and another one tensor for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import FLOAT8, TensorInfo, TensorSpec
from acemerge.models.fused_experts import ExpertPart
from acemerge.models.roles import Roles


def as_stored(model: Checkpoint, label: str, base: Checkpoint, roles: Roles) -> tuple[Checkpoint, str]:
    """A whole model with its mixtures laid out as the base's are, and what is to be said of it.

    No values move: a matrix of one expert is a range of bytes of the tensor of all, and that one is those ranges one
    behind the other. What does not fit is left as it is.
    """
    if model.adapter is not None or not roles.expert_parts:
        return model, ""
    wholes = {roles.identity[name]: name for name in model.tensors if roles.by_name[name].name == "experts"}
    apart = _apart(model, base, roles, wholes)
    together, taken = _together(model, base, roles, wholes)
    made = {**apart, **together}
    if not made:
        return model, ""
    gone = {wholes[roles.expert_parts[name].parameter] for name in apart} | taken
    tensors = {name: spec for name, spec in model.tensors.items() if name not in gone}
    tensors |= {name: info.spec for name, info in made.items()}
    note = f"expert {label}: {len(made):,} tensors of its mixtures of experts are read in the base's layout"
    return replace(model, tensors=tensors, places={**model.places, **made}), note


def _apart(model: Checkpoint, base: Checkpoint, roles: Roles, wholes: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The base's matrices of single experts, within the model's tensors of all."""
    made: dict[str, TensorInfo] = {}
    for name in base.tensors.keys() - model.tensors.keys():
        part = roles.expert_parts.get(name)
        if part is not None and part.parameter in wholes:
            stored = model.places[wholes[part.parameter]]
            info = _within(stored, part, base.tensors[name], roles.by_name[stored.spec.name].transposed)
            made |= {name: info} if info else {}
    return made


def _within(stored: TensorInfo, part: ExpertPart, wanted: TensorSpec, transposed: bool) -> TensorInfo | None:
    """Where a matrix lies within the tensor of all experts; None where it is of another size."""
    rows, columns = wanted.shape if len(wanted.shape) == 2 else (0, 0)
    shape, dtype = stored.spec.shape, stored.spec.dtype
    fits = shape[1:] == (part.parts * rows, columns) and part.number < shape[0] and not transposed
    if not fits or dtype in FLOAT8.values() or stored.parts:
        return None
    before = (part.number * part.parts + part.part) * rows * columns
    offset = stored.offset + before * dtype.itemsize
    return TensorInfo(replace(wanted, dtype=dtype), stored.file, offset, within=stored.stored)


def _together(
    model: Checkpoint, base: Checkpoint, roles: Roles, wholes: Mapping[str, str]
) -> tuple[dict[str, TensorInfo], set[str]]:
    """The base's tensors of all experts, out of the model's single matrices; and the names of these."""
    places: dict[str, dict[tuple[int, int], str]] = {}
    for name in model.tensors:
        part = roles.expert_parts.get(name)
        if part is not None and part.parameter not in wholes:
            places.setdefault(part.parameter, {})[part.number, part.part] = name
    made, taken = {}, set()
    for name, spec in base.tensors.items():
        found = places.get(roles.identity[name], {})
        parts = [model.places[found[place]] for place in sorted(found)]
        if parts and not roles.by_name[name].transposed and _fill(parts, found, roles, spec):
            dtype = parts[0].spec.dtype
            made[name] = TensorInfo(replace(spec, dtype=dtype), parts[0].file, parts[0].offset, tuple(parts))
            taken |= set(found.values())
    return made, taken


def _fill(parts: list[TensorInfo], found: Mapping[tuple[int, int], str], roles: Roles, whole: TensorSpec) -> bool:
    """Whether the matrices are all of a tensor: each expert's, in its shape, of one type."""
    of = roles.expert_parts[next(iter(found.values()))].parts
    experts, *matrix = whole.shape
    every = found.keys() == {(expert, place) for expert in range(experts) for place in range(of)}
    shape = (matrix[0] // of, *matrix[1:])
    alike = {(info.spec.shape, info.spec.dtype) for info in parts} == {(shape, parts[0].spec.dtype)}
    return every and alike and math.prod(shape) * of == math.prod(matrix) and parts[0].spec.dtype not in FLOAT8.values()
