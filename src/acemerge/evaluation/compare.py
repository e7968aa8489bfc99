"""One recipe merged by several rules, so that the results can be evaluated side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from acemerge.api import run_together
from acemerge.engine.opening import open_recipes
from acemerge.engine.run_options import RunOptions
from acemerge.errors import UsageError
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.recipes.tables import MethodSpec
from acemerge.tasks.task_file import Tasks

MERGED = "merged"


def by_methods(recipe: Recipe, methods: Sequence[str]) -> dict[str, Recipe]:
    """The recipe with each rule; the rule that the recipe names keeps its parameters. UsageError for no rule."""
    content = recipe.model_dump()
    specs = {name: recipe.method if name == recipe.method.name else MethodSpec(name=name) for name in methods}
    return {name: make_recipe({**content, "method": spec}, f"method {name}") for name, spec in specs.items()}


def merged_folders(recipes: dict[str, Recipe], out: Path) -> dict[str, str]:
    """OUT/merged/METHOD for each method."""
    return {name: str(out / MERGED / name) for name in recipes}


def merge_all(recipes: dict[str, Recipe], out: Path, options: RunOptions, tell: Callable[[str], None]) -> None:
    """Merge into OUT/merged/METHOD what is not merged there yet. All recipes are planned before the first is run."""
    folders = [Path(folder) for folder in merged_folders(recipes, out).values()]
    options = replace(options, resume=True)
    opened = open_recipes(list(zip(recipes.values(), folders, strict=True)), options)
    for name in recipes:
        tell(f"merging by {name}")
    run_together(list(zip(opened, folders, strict=True)), options)


def rows(base: str, models: dict[str, str], recipes: dict[str, Recipe]) -> dict[str, str]:
    """The base and the models that were named; UsageError where two of them and of the rules have one name."""
    named = {"base": base} | models
    for name in recipes.keys() & models.keys():
        raise UsageError(
            f"model {models[name]}", f"has the name of the rule {name}", "rename its folder, or leave it out"
        )
    if named["base"] != base:
        raise UsageError(f"model {named['base']}", "has the name of the recipe's base", "leave it out, or rename it")
    return named


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
