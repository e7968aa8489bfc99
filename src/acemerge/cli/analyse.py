"""`acemerge analyse`: the papers' figures of any merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from acemerge.cli.options import (
    AllowPickle,
    Base,
    Calibration,
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
    Scale,
    Seed,
    Settings,
    SplitQkv,
    VocabularyOption,
    Workers,
    asked_recipe,
)
from acemerge.cli.progress import progress
from acemerge.cli.text import say, table
from acemerge.engine.opening import RunOptions, check_output_apart, open_recipe

Folder = Annotated[Path | None, typer.Option("-o", "--out", help="folder for JSON, tables and pictures")]
Replace = Annotated[bool, typer.Option("--overwrite", help="replace an earlier analysis")]


def register(app: typer.Typer, out_console: Console, err_console: Console) -> None:
    """Add the command."""

    @app.command("analyse")
    def analyse_command(
        recipe: RecipeFile = None,
        base: Base = None,
        expert: Experts = None,
        method: MethodName = None,
        settings: Settings = None,
        scale: Scale = None,
        policy: PolicyOption = None,
        out: Folder = None,
        device: Device = "cpu",
        compute_dtype: ComputeDtype = None,
        workers: Workers = 1,
        overwrite: Replace = False,
        max_memory: MaxMemory = None,
        allow_pickle: AllowPickle = False,
        dequantize: Dequantize = False,
        split_qkv: SplitQkv = None,
        vocabulary: VocabularyOption = None,
        seed: Seed = None,
        nonfinite: Nonfinite = None,
        calibration: Calibration = None,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Merge without writing: gamma, spectra, principal directions and condition numbers of every layer."""
        from acemerge.inspection.analysis import analyse, with_data
        from acemerge.inspection.analysis_files import check_free, write_analysis
        from acemerge.inspection.analysis_tables import tables

        keys = {
            "base": base,
            "experts": expert,
            "scale": scale,
            "policy": policy,
            "compute_dtype": compute_dtype,
            "seed": seed,
            "nonfinite": nonfinite,
            "split_qkv": split_qkv,
            "vocabulary": vocabulary,
            "calibration": calibration,
        }
        options = RunOptions(
            device,
            workers=workers,
            max_memory=max_memory,
            allow_pickle=allow_pickle,
            dequantize=dequantize,
            quiet=quiet,
        )
        asked = asked_recipe(recipe, keys, method, settings, allow_pickle)
        if out is not None:
            check_output_apart(out, asked.models)
            check_free(out, overwrite)
        opened = open_recipe(asked, None, options)
        data = open_recipe(with_data(asked), None, options) if asked.calibration else None
        with progress(err_console, quiet) as on_progress:
            found = analyse(opened, workers, on_progress, data)
        written = [] if out is None else write_analysis(found, out)
        if quiet:
            return
        for about, header, rows in tables(found):
            say(out_console, about)
            table(out_console, header, rows, numeric=header[1:])
            say(out_console, "")
        for line in written:
            say(out_console, line)
