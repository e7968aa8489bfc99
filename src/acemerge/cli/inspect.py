"""`acemerge inspect`: a look at the experts before they are merged."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from acemerge import show_inspection
from acemerge.cli.options import (
    AllowPickle,
    Base,
    ComputeDtype,
    Debug,
    Dequantize,
    Device,
    Experts,
    MaxMemory,
    MethodName,
    Nonfinite,
    PolicyOption,
    Quiet,
    RecipeFile,
    Settings,
    VocabularyOption,
    Workers,
    asked_recipe,
)
from acemerge.cli.progress import progress
from acemerge.engine.opening import RunOptions, open_recipe
from acemerge.inspection.survey import survey

Json = Annotated[bool, typer.Option("--json", help="print everything as JSON, every layer included")]


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command()
    def inspect(
        recipe: RecipeFile = None,
        base: Base = None,
        expert: Experts = None,
        method: MethodName = None,
        settings: Settings = None,
        policy: PolicyOption = None,
        device: Device = "cpu",
        compute_dtype: ComputeDtype = None,
        workers: Workers = 1,
        max_memory: MaxMemory = None,
        allow_pickle: AllowPickle = False,
        dequantize: Dequantize = False,
        vocabulary: VocabularyOption = None,
        nonfinite: Nonfinite = None,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Look at the experts before merging: how far, how alike, where in conflict. Reads every tensor once."""
        keys = {
            "base": base,
            "experts": expert,
            "policy": policy,
            "compute_dtype": compute_dtype,
            "vocabulary": vocabulary,
            "nonfinite": nonfinite,
        }
        options = RunOptions(
            device,
            workers=workers,
            max_memory=max_memory,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            quiet=quiet,
        )
        opened = open_recipe(asked_recipe(recipe, keys, method, settings), None, options)
        with progress(err_console, quiet) as on_progress:
            seen = survey(opened, workers, on_progress)
        if as_json:
            out_console.file.write(json.dumps(seen.table(), allow_nan=False) + "\n")
        elif not quiet:
            show_inspection.inspection(out_console, seen)
