"""The files that an evaluation leaves: JSON, a Markdown table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.errors import UsageError
from acemerge.evaluation.tables import Evaluation, picture
from acemerge.output.manifest import versions
from acemerge.output.writer import write_file
from acemerge.recipes.recipe import Recipe
from acemerge.tasks.task_file import Tasks

JSON, TABLE, PICTURE = "evaluation.json", "evaluation.md", "evaluation.png"


def check_free(out: Path, overwrite: bool) -> None:
    """UsageError where an earlier evaluation would be replaced unasked."""
    if not overwrite and files.kind(out / JSON) != "nothing":
        raise UsageError(out, "holds an evaluation", "choose another folder or add --overwrite")


def write_results(
    evaluation: Evaluation,
    tasks: Tasks,
    models: dict[str, str],
    out: Path,
    recipes: Mapping[str, Recipe] | None = None,
) -> str | None:
    """Write the three files, the JSON last; the return says why there is no picture, if there is none.

    `recipes` are those of rows whose models were not kept: the JSON has them in the place of a path.
    """
    missing = None
    contents = {TABLE: evaluation.markdown().encode()}
    try:
        contents[PICTURE] = picture(evaluation)
    except UsageError as failure:  # it is no reason to lose the numbers
        missing = f"no {PICTURE}: {failure.what}; {failure.cure}"
    content: dict[str, Any] = evaluation.as_table()
    content |= {"models": models, "asked": tasks.model_dump(mode="json"), "versions": versions()}
    if recipes:
        content["recipes"] = {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}
    contents[JSON] = json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"
    for name, data in contents.items():
        write_file(out / name, data)
    return missing
