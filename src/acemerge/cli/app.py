"""The command line: parsing and printing only."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from acemerge import api
from acemerge.cli import analyse as cli_analyse
from acemerge.cli import evaluate as cli_evaluation
from acemerge.cli import inspect as cli_inspect
from acemerge.cli import merge as show_merge
from acemerge.cli import report as cli_report
from acemerge.cli import reproduce as cli_reproduce
from acemerge.cli import text as show
from acemerge.cli import ui as cli_ui
from acemerge.cli.options import (
    AllowPickle,
    AsLora,
    Base,
    Calibration,
    ComputeDtype,
    Debug,
    Dequantize,
    Device,
    Dtype,
    Experts,
    Force,
    MaxMemory,
    MethodName,
    Nonfinite,
    Out,
    Overwrite,
    PolicyOption,
    Push,
    Quiet,
    RecipeFile,
    Report,
    Resume,
    Scale,
    Seed,
    Settings,
    ShardSize,
    SplitQkv,
    VocabularyOption,
    Workers,
    asked_recipe,
)
from acemerge.cli.progress import is_live, progress
from acemerge.engine.convert import open_conversion
from acemerge.engine.opening import RunOptions, open_recipe
from acemerge.errors import AcemergeError, UsageError
from acemerge.output.manifest import versions
from acemerge.output.verify import verify as verify_folder
from acemerge.recipes.recipe import Recipe

app = typer.Typer(
    name="acemerge",
    help="Merge fine-tuned models into one, without data.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Nobody reads a pipe at 80 columns.
out_console = Console(width=None if sys.stdout and sys.stdout.isatty() else 200)
err_console = Console(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        out_console.print(f"acemerge {versions()['acemerge']}", highlight=False)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


Action = Callable[[Recipe, Path | None, RunOptions, bool], None]


def _merging_command(action: Action) -> None:
    """Register a command that takes a recipe, or its keys as options."""

    @app.command(action.__name__.strip("_"), help=action.__doc__)
    def command(
        recipe: RecipeFile = None,
        base: Base = None,
        expert: Experts = None,
        method: MethodName = None,
        settings: Settings = None,
        scale: Scale = None,
        policy: PolicyOption = None,
        out: Out = None,
        device: Device = "cpu",
        compute_dtype: ComputeDtype = None,
        dtype: Dtype = None,
        max_shard_size: ShardSize = "5GB",
        workers: Workers = 1,
        overwrite: Overwrite = False,
        resume: Resume = False,
        max_memory: MaxMemory = None,
        allow_pickle: AllowPickle = False,
        dequantize: Dequantize = False,
        force: Force = False,
        split_qkv: SplitQkv = None,
        vocabulary: VocabularyOption = None,
        seed: Seed = None,
        nonfinite: Nonfinite = None,
        as_lora: AsLora = None,
        calibration: Calibration = None,
        push: Push = None,
        report: Report = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        keys = {
            "base": base,
            "experts": expert,
            "scale": scale,
            "policy": policy,
            "compute_dtype": compute_dtype,
            "dtype": dtype,
            "seed": seed,
            "nonfinite": nonfinite,
            "split_qkv": split_qkv,
            "vocabulary": vocabulary,
            "as_lora": as_lora,
            "calibration": calibration,
        }
        asked = asked_recipe(recipe, keys, method, settings, allow_pickle)
        options = RunOptions(
            device,
            max_shard_size,
            workers,
            overwrite,
            resume,
            max_memory,
            allow_pickle,
            dequantize,
            force,
            quiet,
            push,
            report,
        )
        action(asked, out, options, quiet)


def _merge(recipe: Recipe, out: Path | None, options: RunOptions, quiet: bool) -> None:
    """Merge a base and its experts into one folder."""
    if out is None:
        raise UsageError("command line", "-o is missing", "name the output folder with -o OUT")
    opened = open_recipe(recipe, out, options)  # downloads have a bar of their own
    if not quiet:
        show_merge.before(err_console, opened, out, options.resume)
    with progress(err_console, quiet) as on_progress:
        report = api.run_opened(opened, out, options, on_progress)
    if not quiet:
        show_merge.after(out_console, report, warned=is_live(err_console))


def _plan(recipe: Recipe, out: Path | None, options: RunOptions, quiet: bool) -> None:
    """Show every tensor, its role, its rule and why; reads headers only."""
    opened = open_recipe(recipe, out, options)
    if not quiet:
        show.plan(out_console, opened.plan)


_merging_command(_merge)
_merging_command(_plan)
cli_inspect.register(app, out_console, err_console)
cli_analyse.register(app, out_console, err_console)
cli_report.register(app, out_console, err_console)
cli_ui.register(app, out_console, err_console)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="checkpoint folder, Hub id, or with --allow-pickle a .bin")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="output folder")],
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Resume = False,
    allow_pickle: AllowPickle = False,
    dequantize: Dequantize = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint anew as safetensors, its values unchanged."""
    options = RunOptions(
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
        quiet=quiet,
    )
    opened = open_conversion(source, out, options)
    with progress(err_console, quiet) as on_progress:
        report = api.run_opened(opened, out, options, on_progress)
    if not quiet:
        show.converted(out_console, report)


@app.command()
def verify(out: Annotated[Path, typer.Argument(help="folder that acemerge wrote")], debug: Debug = False) -> None:
    """Check hashes, completeness and finiteness of an output folder."""
    manifest = verify_folder(out)
    show.verified(out_console, out, manifest)


@app.command("extract-lora")
def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of a full fine-tune")],
    base: Annotated[str, typer.Option(help="folder or Hub id (org/name@revision) that it comes from")],
    rank: Annotated[int, typer.Option(help="rank of the adapter")],
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")],
    device: Device = "cpu",
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a LoRA adapter of a full fine-tune, and say what of it is lost."""
    from acemerge.extract import extract_lora

    options = RunOptions(device, overwrite=overwrite, allow_pickle=allow_pickle, quiet=quiet)
    report = extract_lora(model, base, rank, out, options)
    if not quiet:
        show.extracted(out_console, report)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one rule, in detail")] = None, debug: Debug = False
) -> None:
    """List the rules, or show one with its parameters, defaults and source."""
    show.methods(out_console, name)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the models")] = Path("acemerge-demo"),
    debug: Debug = False,
) -> None:
    """Train a small vision transformer and six experts on real images, merge them by three rules, compare."""
    from acemerge.demo import run_demo

    run_demo(out, out_console)


cli_evaluation.register(app, out_console, err_console)
cli_reproduce.register(app, out_console, err_console)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, standalone_mode=False, prog_name="acemerge")
        if code == 130:  # typer's own answer to an interrupt says nothing
            raise KeyboardInterrupt
    except (
        AcemergeError,
        typer.TyperException,
        KeyboardInterrupt,
        typer.Abort,
        OSError,
        MemoryError,
    ) as failure:
        if "--debug" in arguments:
            traceback.print_exc()
        code = _report(failure)
    except Exception as failure:  # a defect of ours: still one line, and how to see more
        if "--debug" in arguments:
            raise
        what = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        sys.stderr.write(f"acemerge: error: internal: {what}; run again with --debug and report it\n")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _report(failure: BaseException) -> int:
    if isinstance(failure, AcemergeError):
        line, code = str(failure), failure.exit_code
    elif isinstance(failure, typer.TyperException):
        message = " ".join(failure.format_message().split()).rstrip(".")
        line, code = f"command line: {message}; see acemerge --help", 2
    elif isinstance(failure, MemoryError):
        line, code = "memory: not enough for the largest tensor; use fewer workers or a larger machine", 4
    elif isinstance(failure, OSError):  # what reads and writes models has errors of its own: this is the terminal
        line, code = f"standard output: {failure.strerror}; what was said to be written is written", 5
    else:
        line, code = "interrupted: nothing unfinished was published; run it again, a merge with --resume to go on", 130
    sys.stderr.write(f"acemerge: error: {line}\n")
    return code
