"""`acemerge compare`: models, and rules, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.evaluate import TaskFile, score
from acemerge.cli.options import OUTPUT, RULE, TELLING, Options, option
from acemerge.cli.text import say, stderr
from acemerge.errors import UsageError

if TYPE_CHECKING:
    from acemerge.recipes.recipe import Recipe
    from acemerge.tasks.task_file import Tasks


@command(
    "compare",
    group="Judge",
    takes=("base", "expert", "calibration", "out", "overwrite", "device", *TELLING),
    examples=(
        "acemerge compare ./merged ./other --tasks tasks.yaml -o ./scores",
        "acemerge compare recipe.yaml --methods auto,ties --tasks tasks.yaml -o ./scores",
    ),
    page="evaluate.md",
    helps={
        "base": "what all experts come from, in the place of a recipe; what adapters come from, if they do not say",
        "expert": "an expert; repeat for each",
        "out": "folder for results and merges",
        "overwrite": "replace an earlier evaluation and unlike merges",
    },
)
def compare(
    asked: Options,
    tasks: TaskFile,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL...] [RECIPE.yaml]", help="models, and a recipe to merge")
    ] = None,
    methods: Annotated[str | None, option(RULE, "rules to merge by, as ace,actmat,tsv_m", metavar="NAME,...")] = None,
    scores_only: Annotated[
        bool, option(OUTPUT, "keep no merged model: merge in memory where it fits, else one by one", "--scores-only")
    ] = False,
) -> None:
    """Score models side by side; with --methods, merge by each rule first."""
    out = asked.output
    if scores_only and methods is None:
        raise UsageError("--scores-only", "there are no merges to do without", "give it with a recipe and --methods")

    from acemerge.engine.opening import check_output_apart
    from acemerge.evaluation.compare import by_methods, with_experts
    from acemerge.evaluation.results import check_free
    from acemerge.recipes.labels import expert_labels
    from acemerge.tasks.task_file import load_tasks

    named = [name for name in models or [] if not _is_recipe(name)]
    recipes_named = [name for name in models or [] if _is_recipe(name)]
    of_adapters = bool(asked.base) and not (asked.expert or methods or recipes_named)
    if (asked.base or asked.expert) and not (of_adapters or recipes_named):
        asked.check_models()
    found, given = load_tasks(tasks), dict(zip(expert_labels(named), named, strict=True))
    recipe = None if of_adapters else _recipe(recipes_named, asked)
    check_output_apart(out, list(given.values()))
    check_free(out, asked.overwrite)
    if (recipe is None) != (methods is None):
        what, cure = ("--methods is missing", "name rules, as --methods ace,actmat")
        if recipe is None:
            what, cure = ("nothing to merge", "give a recipe file, or --base and --expert")
        raise UsageError("command line", what, cure)
    if recipe is not None and methods is not None:
        recipes = by_methods(recipe, [name.strip() for name in methods.split(",")])
        _score_rules(asked, recipes, given, with_experts(found, recipe), recipe.base, kept=not scores_only)
    elif not given:
        raise UsageError("command line", "nothing to compare", "name models, or a recipe and --methods")
    else:
        score(asked, given, found, asked.base)


def _score_rules(
    asked: Options, recipes: dict[str, Recipe], models: dict[str, str], tasks: Tasks, base: str, kept: bool
) -> None:
    """Score the base, the models, and what comes out of each rule."""
    from acemerge.evaluation.compare import merge_all, merged_folders, rows
    from acemerge.evaluation.unkept import Unkept

    def tell(text: str) -> None:
        if not asked.silent:
            say(stderr(), text)

    models, out, options = rows(base, models, recipes), asked.output, asked.run_options()
    if not kept:
        score(asked, models, tasks, base, Unkept(recipes, out, options, tell))
        return
    merge_all(recipes, out, options, tell)
    score(asked, models | merged_folders(recipes, out), tasks, base)


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _recipe(files: list[str], asked: Options) -> Recipe | None:
    from acemerge.recipes.recipe import load_recipe, make_recipe

    named = {"base": asked.base, "experts": asked.experts(), "calibration": asked.calibration}
    keys = {key: value for key, value in named.items() if value}
    if len(files) > 1:
        raise UsageError("command line", "two recipes", "give one")
    if files:
        return load_recipe(Path(files[0]), keys)
    return make_recipe(keys, "command line") if keys else None
