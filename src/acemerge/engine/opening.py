"""A recipe and the options of a run, checked and opened: from headers, and the few tensors that must be equal."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from acemerge.checkpoints import files, machine
from acemerge.checkpoints.address import parse, scheme_of
from acemerge.checkpoints.assets import in_module, module_weights
from acemerge.checkpoints.folder import CONFIG, Checkpoint
from acemerge.checkpoints.hub import Located, locate
from acemerge.checkpoints.lora import open_expert, with_adapter
from acemerge.checkpoints.reader import Reader
from acemerge.checkpoints.tokenizer import read_tokens, same_tokenizer
from acemerge.checkpoints.wrappers import without_wrapper
from acemerge.engine.agreement import check_agreement
from acemerge.engine.execute import Layout
from acemerge.engine.foreseen import allowed
from acemerge.engine.pipeline import Pipeline, threads_of
from acemerge.engine.shared_factors import shared_input_factors
from acemerge.engine.work import Setting
from acemerge.errors import CheckpointError, ResourceError, UsageError, shown
from acemerge.models.mixtures import as_stored
from acemerge.models.roles import Roles, find_roles
from acemerge.models.submodels import as_part
from acemerge.models.tied_heads import heads_apart
from acemerge.models.vocabulary import Tokens
from acemerge.output.folder import check_output
from acemerge.output.identity import identity
from acemerge.output.upload import check_push
from acemerge.planning.as_lora import as_adapter
from acemerge.planning.calibration import Assigned, assign
from acemerge.planning.costs import largest
from acemerge.planning.jobs import Plan
from acemerge.planning.lost_assets import lost_assets
from acemerge.planning.parts import Part, check_parts, parse_part
from acemerge.planning.planner import make_plan
from acemerge.planning.slices import as_sliced
from acemerge.planning.surprises import same_models
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.recipe import Recipe

# What libraries take beside the threads and tensors when they are used first.
_LIBRARIES = 64 << 20
# HOST:PORT
_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}", re.ASCII)


def _device_name(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


def _cluster(value: str | None) -> str | None:
    """What Ray's driver may be told: its client, `ray://`, would run here without the cluster's file system."""
    if value is not None and value not in ("auto", "local") and not _ADDRESS.fullmatch(value):
        raise ValueError("is no cluster")
    return value


Bytes = Annotated[ByteSize, Field(ge=1, lt=1 << 62)]


@pydantic_dataclass(frozen=True, config=ConfigDict(validate_default=True))
class RunOptions:
    """What decides how a recipe is run, but not the values that come out. Sizes are numbers of bytes, or as `5GB`."""

    device: Annotated[str, BeforeValidator(_device_name)] = "cpu"
    max_shard_size: Bytes = ByteSize(5 * 10**9)
    workers: Annotated[int, Field(ge=1)] = 1
    overwrite: bool = False
    resume: bool = False
    max_memory: Bytes | None = None
    allow_pickle: bool = False
    dequantize: bool = False
    force: bool = False
    quiet: bool = False
    push: str | None = None
    report: bool = False
    shard: Annotated[Part | None, BeforeValidator(parse_part)] = None
    finish: bool = False
    ray: Annotated[str | None, AfterValidator(_cluster)] = None
    stream: bool = False

    @property
    def asked_for_parts(self) -> str | None:
        """The option that has the merge done in parts, and its value; None where none has."""
        if self.shard is not None:
            return f"--shard {self.shard}"
        return "--finish" if self.finish else f"--ray {self.ray}" if self.ray is not None else None


_WRONG = {
    "workers": ("is not a number of workers", "use 1 or more"),
    "max_shard_size": ("is not a size in bytes", "write for example 5GB or 512MiB"),
    "shard": ("is no part of a merge", "write K/N with K from 1 to N, as 2/3"),
    "ray": ("is no Ray cluster", "write HOST:PORT of its head, on a machine of the cluster; or auto, or local"),
    "max_memory": ("is not a size in bytes", "write for example 8GB or 512MiB"),
}


def make_options(given: Mapping[str, Any]) -> RunOptions:
    """Checked options of a run; UsageError names the first wrong one and the cure."""
    try:
        return RunOptions(**given)
    except ValidationError as failure:
        first = failure.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"][0].lower() + first["msg"][1:]
        what, cure = _WRONG.get(name, (f"is wrong: {message}", "see `acemerge merge --help`"))
        raise UsageError(f"--{name.replace('_', '-')}", f"{shown(first['input'])} {what}", cure) from None


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
    _check_together(options)
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
    located = [locate(model, options.allow_pickle, options.quiet, stream=options.stream) for model in named]
    opened = tuple(open_expert(model.path, options.allow_pickle, options.dequantize) for model in located)
    base, *models = opened[: len(recipe.models)]
    if base.adapter is not None:
        raise CheckpointError(recipe.base, "is an adapter, which is no base", "name the model that it was trained on")
    applied = dict(zip(recipe.adapters, located[len(recipe.models) :], strict=True))
    labels = expert_labels([applied.get(i, located[i]).name for i in range(1, len(recipe.models))])
    owner = _assets_owner(recipe, labels, opened)
    experts, unwrapping = _unwrapped(base, models, labels)
    adapters = dict(zip(recipe.adapters, opened[len(recipe.models) :], strict=True))
    experts = [with_adapter(e, adapters[i]) if i in adapters else e for i, e in enumerate(experts, 1)]
    if recipe.slices:
        base, experts = as_sliced(recipe.slices, base, experts, labels)
    (base, *experts), roles, matching = _matched(base, experts, labels)
    read_from = [(located[i], *([applied[i]] if i in applied else [])) for i in range(1, 1 + len(labels))]
    twice = [] if recipe.slices else same_models(labels, [tuple(m.path for m in models) for models in read_from])
    notes = (*twice, *unwrapping, *matching, *_unmerged_modules(recipe.assets, owner, base))
    tokens = _tokens(recipe, opened[: len(recipe.models)])
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


def _check_together(options: RunOptions) -> None:
    """UsageError where a part is asked for something that only all parts together have."""
    if options.ray is not None and (options.shard is not None or options.finish):
        what = f"does not go with --{'finish' if options.finish else 'shard'}"
        raise UsageError(f"--ray {options.ray}", what, "give it alone: it computes all parts and puts them together")
    if options.ray is not None and options.device not in ("cpu", "cuda", "auto"):
        what = "cannot be chosen where Ray gives each task a device of its own"
        raise UsageError(f"--device {options.device}", what, "use cpu, cuda or auto")
    beside = {"finish": options.finish, "push": options.push is not None, "report": options.report}
    for name in (name for name, given in beside.items() if given and options.shard is not None):
        cure = "give it by itself" if name == "finish" else "give it with --finish"
        raise UsageError(f"--shard {options.shard}", f"a part has no use for --{name}", cure)


def _unwrapped(
    base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str]
) -> tuple[Sequence[Checkpoint], list[str]]:
    """The experts without a wrapper's part in their names, and of which it was taken off."""
    found = [without_wrapper(expert, base.tensors) for expert in experts]
    notes = [f"expert {label}: {about}" for label, (_, about) in zip(labels, found, strict=True) if about]
    return [expert for expert, _ in found], notes


def _matched(
    base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str]
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """All models under names that the base knows, their roles, and what was done about those that differ."""
    # The experts' own names too: a tied tensor may have its other spelling there only.
    specs = {name: spec for source in (*reversed(experts), base) for name, spec in source.tensors.items()}
    roles, models, notes = find_roles(base.config, specs), [base], []
    for label, expert in zip(labels, experts, strict=True):
        model, part = as_part(expert, label, base, roles)
        model, layout = as_stored(model, label, base, roles)
        models.append(model)
        notes += [note for note in (part, layout) if note]
    who = ["base", *(f"expert {label}" for label in labels)]
    apart, roles, tied = heads_apart(models, who, roles)
    return apart, roles, [*notes, *tied]


def _tokens(recipe: Recipe, models: Sequence[Checkpoint]) -> Sequence[Tokens | None]:
    """The tokens of every model; nothing where all have the same and nothing is to be matched."""
    if recipe.vocabulary != "refuse":
        return [read_tokens(model) for model in models]
    if same_tokenizer([model for model in models if model.adapter is None]):
        return ()
    return [_tokens_if_readable(model) for model in models]


def _tokens_if_readable(model: Checkpoint) -> Tokens | None:
    """To warn by: the merge itself does not need them."""
    try:
        return read_tokens(model)
    except CheckpointError:
        return None


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
    target = files.resolve(files.output_path(out))
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


def find_devices(name: str) -> tuple[torch.device, ...]:
    """`cpu`, one accelerator by its number, or all of them: `cuda`, and `auto` where there are any."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise UsageError(f"--device {name}", "unknown device", "use cpu, cuda, cuda:N or auto")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}", "no CUDA device is available", "use --device cpu")
    if name == "cuda":
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    try:
        return (torch.device(name),)
    except RuntimeError:
        raise UsageError(f"--device {name}", "unknown device", "use cpu, cuda, cuda:N or auto") from None
