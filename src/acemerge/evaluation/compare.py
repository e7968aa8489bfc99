"""One recipe merged by several rules, so that the results can be evaluated side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from acemerge.api import run_recipe
from acemerge.evaluation.tasks import Tasks
from acemerge.opening import RunOptions, open_recipe
from acemerge.plan import expert_labels
from acemerge.recipe import MethodSpec, Recipe, make_recipe

MERGED = "merged"


def by_methods(recipe: Recipe, methods: Sequence[str]) -> dict[str, Recipe]:
    """The recipe with each rule; the rule that the recipe names keeps its parameters. UsageError for no rule."""
    content = recipe.model_dump()
    specs = {name: recipe.method if name == recipe.method.name else MethodSpec(name=name) for name in methods}
    return {name: make_recipe({**content, "method": spec}, f"method {name}") for name, spec in specs.items()}


def merge_all(
    recipes: dict[str, Recipe], out: Path, options: RunOptions, tell: Callable[[str], None]
) -> dict[str, str]:
    """Merge into OUT/merged/METHOD what is not merged there yet; the folders by the methods' names.

    All recipes are planned before the first is run.
    """
    folders = {name: out / MERGED / name for name in recipes}
    for name, recipe in recipes.items():
        open_recipe(recipe, folders[name], options)
    for name, recipe in recipes.items():
        tell(f"merging by {name}")
        run_recipe(recipe, folders[name], replace(options, resume=True))
    return {name: str(folder) for name, folder in folders.items()}


def with_experts(tasks: Tasks, recipe: Recipe) -> Tasks:
    """Tasks that name no expert get the recipe's expert of their head's name, where there is one."""
    models = [expert.model for expert in recipe.experts]
    by_label = dict(zip(expert_labels(models), models, strict=True))
    found = [
        task.model_copy(update={"expert": by_label[task.head_label]})
        if task.expert is None and task.head_label in by_label
        else task
        for task in tasks.tasks
    ]
    return tasks.model_copy(update={"tasks": found})
