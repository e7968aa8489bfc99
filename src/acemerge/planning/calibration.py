"""Which tasks calibrate which expert, told from the task file and the plan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import hub_id
from acemerge.errors import UsageError
from acemerge.methods import Calibration
from acemerge.models.lora_targets import task_type
from acemerge.models.quiet import need_transformers
from acemerge.planning.jobs import ByRule, Plan
from acemerge.recipes.recipe import SELF
from acemerge.tasks.networks import MERGE_ALONE
from acemerge.tasks.own_text import OwnText, own_text
from acemerge.tasks.task_file import AnyTask, LmEval, Task, load_tasks


@dataclass(frozen=True)
class Assigned:
    """An expert by its label and as the recipe names it, and the tasks whose data it is calibrated on."""

    label: str
    model: str
    tasks: tuple[Task | OwnText, ...]


def assign(plan: Plan, config: Mapping[str, Any]) -> tuple[tuple[Assigned, ...], list[str]]:
    """The tasks of every expert where a rule of the plan wants them, and what is to be warned of.

    A task is an expert's whose path its `expert:` is; without that, whose label its head has. With `self` every expert
    writes text. UsageError where an expert has no task, or where the plan or the architecture in `config` and
    calibration do not go together.
    """
    recipe = plan.recipe
    if recipe.calibration is None:
        return (), []
    wanting = calibrated_jobs(plan)
    if not wanting:
        return (), ["calibration: no rule of this merge asks for it"]
    named = [(label, expert.model) for label, expert in zip(plan.experts, recipe.experts, strict=True)]
    if recipe.calibration == SELF:
        _check(plan, wanting)
        _check_writer(config)
        need_transformers()
        return tuple(Assigned(label, model, (own_text(recipe.seed, label),)) for label, model in named), []
    tasks = [_with_examples(task) for task in load_tasks(Path(recipe.calibration), labelled=False).tasks]
    _check(plan, wanting)
    need_transformers()
    owners = [_owner(task, named) for task in tasks]
    for i, (label, model) in enumerate(named):
        if i not in owners:
            there = model if hub_id(model) else files.resolve(Path(model))  # a task file's paths are relative to itself
            cure = f"add one with `expert: {there}`, or with `head: {label}`"
            raise UsageError(recipe.calibration, f"no task belongs to expert {label}", cure)
    assigned = tuple(
        Assigned(label, model, tuple(t for t, owner in zip(tasks, owners, strict=True) if owner == i))
        for i, (label, model) in enumerate(named)
    )
    unused = [task.name for task, owner in zip(tasks, owners, strict=True) if owner is None]
    return assigned, [f"calibration: task {name} belongs to none of the experts and is not used" for name in unused]


def _with_examples(task: AnyTask) -> Task:
    if isinstance(task, LmEval):
        what = "is lm_eval's, and its examples are not read here"
        raise UsageError(f"task {task.name}", what, "give the data itself, as classification or perplexity")
    return task


def calibrated_jobs(plan: Plan, wanted: Calibration | None = None) -> list[ByRule]:
    """The jobs whose rule wants measurements, of one kind or of any."""
    kinds = [(job, job.method.needs.calibration) for job in plan.ruled]
    return [job for job, kind in kinds if kind is not None and wanted in (None, kind)]


def _check(plan: Plan, wanting: Sequence[ByRule]) -> None:
    recipe = plan.recipe
    for given, what in ((recipe.slices, "slices of layers"), (recipe.vocabulary != "refuse", "vocabulary")):
        if given:
            why = f"the models that are run do not have the output's tensors with {what}"
            raise UsageError("calibration", why, f"leave {what} out, or use a rule without data")
    for label, adapter in plan.adapters.items():
        what = f"is an adapter ({adapter}), which is not run by itself"
        raise UsageError(f"expert {label}", what, MERGE_ALONE)
    stored = [job.name for job in wanting if job.role.transposed and not job.transposed and not _is_entrywise(job)]
    if stored:
        what = f"tensor {stored[0]!r} is merged as it is stored, its inputs are the rows"
        raise UsageError("calibration", what, "use orientation input, and policy default")


def _check_writer(config: Mapping[str, Any]) -> None:
    """UsageError for what is no causal language model."""
    if task_type(config) != "CAUSAL_LM":
        found = config.get("architectures")
        name = found[0] if isinstance(found, list) and found else "this model"
        what = f"{name} cannot write the text that it is calibrated on"
        cure = "only causal language models can; name tasks of the experts by --calibration TASKS.yaml"
        raise UsageError(f"calibration {SELF}", what, cure)


def _is_entrywise(job: ByRule) -> bool:
    return job.method.needs.calibration == "gradients"


def _owner(task: Task, named: Sequence[tuple[str, str]]) -> int | None:
    """The number of the expert that a task belongs to."""
    for i, (label, model) in enumerate(named):
        if task.head_label == label if task.expert is None else _same(task.expert, model):
            return i
    return None


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    folders = hub_id(one) is None and hub_id(other) is None
    return folders and files.resolve(Path(one)) == files.resolve(Path(other))
