"""A recipe and the options of a run, checked and opened: from headers, and the few tensors that must be equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files, machine, named
from acemerge.checkpoints.address import parse, scheme_of
from acemerge.checkpoints.assets import in_module, module_weights
from acemerge.checkpoints.config import CONFIG
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.hub import Located, locate
from acemerge.checkpoints.hub_files import from_cache
from acemerge.checkpoints.lora import open_expert, with_adapter
from acemerge.checkpoints.pointers import check_all_fetched
from acemerge.checkpoints.reader import Reader
from acemerge.engine.agreement import check_agreement
from acemerge.engine.devices import find_devices
from acemerge.engine.execute import Layout
from acemerge.engine.foreseen import allowed
from acemerge.engine.matching import matched, tokens_of, unwrapped
from acemerge.engine.pipeline import Pipeline, threads_of
from acemerge.engine.run_options import RunOptions, check_together
from acemerge.engine.shared_factors import shared_input_factors
from acemerge.engine.work import Setting
from acemerge.errors import CheckpointError, ResourceError, UsageError
from acemerge.models.roles import Roles
from acemerge.models.vocabulary import Tokens
from acemerge.output.folder import check_output
from acemerge.output.identity import identity
from acemerge.output.upload import check_push
from acemerge.planning.as_lora import as_adapter
from acemerge.planning.calibration import Assigned, assign
from acemerge.planning.costs import largest
from acemerge.planning.jobs import Plan
from acemerge.planning.lost_assets import lost_assets
from acemerge.planning.parts import Part, check_parts
from acemerge.planning.planner import make_plan
from acemerge.planning.slices import as_sliced
from acemerge.planning.surprises import same_models
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.recipe import Recipe

# What libraries take beside the threads and tensors when they are used first.
_LIBRARIES = 64 << 20


@dataclass(frozen=True)
class Opened:
    """A recipe with its checkpoints opened and its plan made; what a rule merges is not read yet.

    `models` are the checkpoints as they lie on disk, the base's first and last the adapters that experts have, and
    `origins` says for each of them where it is from: its path, or its Hub id with the commit. `base` and `experts` are
    what is merged: with slices other layers, or those of others. `calibration` has each expert's tasks, if rules of the
    plan want data.
    """

    plan: Plan
    roles: Roles
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    models: tuple[Checkpoint, ...]
    origins: tuple[str, ...]
    devices: tuple[torch.device, ...]
    max_shard: int
    budget: int
    calibration: tuple[Assigned, ...] = ()
    part: Part | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.plan.recipe, self.plan.experts)

    @property
    def assets_from(self) -> Checkpoint:
        """The model whose tokenizer, template and processor files the output gets."""
        return self.models[self.plan.recipe.assets_number(self.plan.experts) or 0]

    @property
    def layout(self) -> Layout:
        return Layout(self.plan, self.max_shard, self.part)

    @contextlib.contextmanager
    def pipeline(self, workers: int, hashing: bool) -> Iterator[tuple[Pipeline, list[Reader]]]:
        """The threads that stream these checkpoints, and their readers."""
        nbytes = sum(prints[0] for checkpoint in self.models for prints in checkpoint.fingerprints.values())
        cached = machine.stays_cached(nbytes)
        readers = [Reader(checkpoint, hashing, cached) for checkpoint in self.checkpoints]
        with Pipeline(readers, self.devices, workers, self._within_limit(len(readers), workers)) as pipeline:
            yield pipeline, readers

    def _within_limit(self, readers: int, workers: int) -> int:
        """The budget, or what a limit on address space leaves of it beside the threads.

        ResourceError where that is too little for a tensor: without memory, libraries end the process as they like.
        """
        left = machine.address_space_left()
        if left is None:
            return self.budget
        left -= threads_of(readers, workers, torch.get_num_threads()) * machine.stack_size() + _LIBRARIES
        needed, name = largest(self.plan)
        if left < needed:
            what = f"there is not enough memory: {needed - left:,} bytes more than the limit (ulimit -v) leaves"
            raise ResourceError(f"tensor {name!r}", what, "raise the limit, or use fewer --workers")
        return min(self.budget, left)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts)


def identity_of(opened: Opened, device: str) -> dict[str, Any]:
    """What run this is, computed here on this device."""
    return identity(opened.plan.recipe, opened.models, opened.origins, opened.max_shard, device)


def open_recipe(recipe: Recipe, out: Path | None, options: RunOptions) -> Opened:
    """Check the options, open the checkpoints and plan the merge; see the module."""
    return open_recipes([(recipe, out)], options)[0]


def open_recipes(recipes: Sequence[tuple[Recipe, Path | None]], options: RunOptions) -> list[Opened]:
    """The same for recipes that differ in their rules alone, each with its output: their models are opened once."""
    recipe = recipes[0][0]
    check_together(options)
    for _, out in recipes:
        _check_place(out, recipe, options)
    devices = find_devices(options.device if options.ray is None else "cpu")
    if options.push is not None:
        check_push(options.push)
    models = _open_models(recipe, options)
    for out in (out for _, out in recipes if out is not None):
        check_output_apart(out, [str(model.path) for model in models.located])
    return [_planned(models, recipe, options, devices) for recipe, _ in recipes]


def _check_place(out: Path | None, recipe: Recipe, options: RunOptions) -> None:
    """UsageError where the output cannot go there."""
    if out is None:
        return
    check_output_apart(out, [*recipe.models, *recipe.adapters.values()])
    check_output(out, options.overwrite, options.resume, options.shard is not None or options.finish)
    if options.push is not None and scheme_of(out):
        raise UsageError("--push", "the output is in a store", "write to a folder to upload it, or leave --push out")


@dataclass(frozen=True)
class _Models:
    """The models of a recipe, opened: as they lie on disk, and as they are merged, under names that agree."""

    located: Sequence[Located]
    opened: tuple[Checkpoint, ...]
    owner: Checkpoint
    labels: Sequence[str]
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    roles: Roles
    tokens: Sequence[Tokens | None]
    notes: tuple[str, ...]


def _open_models(recipe: Recipe, options: RunOptions) -> _Models:
    named = [*recipe.models, *recipe.adapters.values()]
    with from_cache():
        located = [locate(model, options.allow_pickle, options.quiet, stream=options.stream) for model in named]
        opened = tuple(open_expert(model.path, options.allow_pickle, options.dequantize) for model in located)
    base, *models = opened[: len(recipe.models)]
    if base.adapter is not None:
        raise CheckpointError(recipe.base, "is an adapter, which is no base", "name the model that it was trained on")
    applied = dict(zip(recipe.adapters, located[len(recipe.models) :], strict=True))
    labels = expert_labels([applied.get(i, located[i]).name for i in range(1, len(recipe.models))])
    owner = _assets_owner(recipe, labels, opened)
    check_all_fetched(owner.path, owner.assets)
    experts, unwrapping = unwrapped(base, models, labels)
    adapters = dict(zip(recipe.adapters, opened[len(recipe.models) :], strict=True))
    experts = [with_adapter(e, adapters[i]) if i in adapters else e for i, e in enumerate(experts, 1)]
    if recipe.slices:
        base, experts = as_sliced(recipe.slices, base, experts, labels)
    (base, *experts), roles, matching = matched(base, experts, labels)
    read_from = [(located[i], *([applied[i]] if i in applied else [])) for i in range(1, 1 + len(labels))]
    twice = [] if recipe.slices else same_models(labels, [tuple(m.path for m in models) for models in read_from])
    notes = (*twice, *unwrapping, *matching, *_unmerged_modules(recipe.assets, owner, base))
    tokens = tokens_of(recipe, opened[: len(recipe.models)])
    return _Models(located, opened, owner, labels, base, tuple(experts), roles, tokens, notes)


def _planned(models: _Models, recipe: Recipe, options: RunOptions, devices: tuple[torch.device, ...]) -> Opened:
    base, experts, labels, tokens = models.base, models.experts, models.labels, models.tokens
    plan = make_plan(recipe, base, experts, labels, models.roles, tokens)
    if recipe.as_lora is not None:
        plan = as_adapter(plan, models.roles, recipe.as_lora)
    if options.asked_for_parts is not None:
        whole = Layout(plan, options.max_shard_size)
        check_parts(plan, options.asked_for_parts, options.shard, len(whole.every))
    calibration, unused = assign(plan, base.config)
    notes = (*models.notes, *_losses(models, recipe, plan))
    plan = replace(
        plan,
        warnings=(*notes, *plan.warnings, *shared_input_factors(plan, experts), *unused),
        calibration={expert.label: tuple(task.name for task in expert.tasks) for expert in calibration},
    )
    check_agreement(plan, (base, *experts), Setting(plan.recipe, plan.experts))
    origins = tuple(model.origin for model in models.located)
    most, shard = allowed(plan, options.max_memory, options.workers), options.max_shard_size
    part = options.shard
    return Opened(plan, models.roles, base, experts, models.opened, origins, devices, shard, most, calibration, part)


def _losses(models: _Models, recipe: Recipe, plan: Plan) -> Sequence[str]:
    """What the experts have beside their weights and the output will not."""
    if plan.is_adapter:
        return ()
    labels, tokens = models.labels, models.tokens
    known: dict[str, Tokens | None] = {}
    if tokens:
        known = {"": tokens[recipe.assets_number(labels) or 0], **dict(zip(labels, tokens[1:], strict=True))}
    own = models.opened[1 : 1 + len(labels)]
    return lost_assets(recipe, models.opened[0], models.owner, dict(zip(labels, own, strict=True)), known)


def _unmerged_modules(wanted: str, owner: Checkpoint, base: Checkpoint) -> list[str]:
    """A note on each module behind the transformer that the base lacks."""
    merged = {in_module(name)[0] for name in base.tensors}
    names = [name.split("/")[0] for name in module_weights(owner.assets) if name not in merged]
    return [f"{name} is not in the base: the output has that of expert {wanted}, as it is" for name in names]


def _assets_owner(recipe: Recipe, labels: Sequence[str], models: Sequence[Checkpoint]) -> Checkpoint:
    """The model that the output's tokenizer is to come from; UsageError when it is not there or has none."""
    number = recipe.assets_number(labels)
    if number is None:
        what = f"{recipe.assets!r} is none of the models"
        raise UsageError("assets", what, f"use base or one of: {', '.join(labels)}")
    if number and not set(models[number].assets) - {CONFIG}:
        what = f"expert {labels[number - 1]} has no tokenizer, template or processor files"
        raise UsageError("assets", what, "copy them into its folder, or name another model")
    return models[number]


def check_output_apart(out: Path, inputs: Sequence[str]) -> None:
    """UsageError when the output folder is, holds or lies in an input, under whatever name, or is no folder's name."""
    target = files.resolve(named.output_path(out))
    there, inside = files.places(target), files.folders_within(target)
    for path in inputs:
        source = files.resolve(parse(path) or Path(path))
        known = files.places(source)
        # By device and inode, which a bind mount has of what is mounted: around either, or anywhere in both.
        same = (target in there and there[target] in known.values()) or (
            source in known and known[source] in there.values()
        )
        same = same or bool(inside & files.folders_within(source))
        if target == source or target.is_relative_to(source) or source.is_relative_to(target) or same:
            what = f"is the same folder as, inside or around the input {path}"
            raise UsageError(out, what, "choose a folder of its own for the output")
