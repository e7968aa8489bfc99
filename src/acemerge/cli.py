"""The command line: parsing and printing only."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from acemerge import api, cli_evaluation, show
from acemerge.convert import open_conversion
from acemerge.errors import AcemergeError, UsageError
from acemerge.opening import RunOptions, open_recipe
from acemerge.recipe import Recipe, load_recipe, make_recipe, parse_settings
from acemerge.report.manifest import versions
from acemerge.verify import verify as verify_folder

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

RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="recipe file")]
Base = Annotated[str | None, typer.Option(help="folder or Hub id (org/name@revision) that all experts come from")]
Experts = Annotated[list[str] | None, typer.Option("--expert", help="an expert's folder or Hub id; repeat for each")]
MethodName = Annotated[str | None, typer.Option(help="merge rule, see `acemerge methods` [default: ace]")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a parameter of the rule")]
Scale = Annotated[float | None, typer.Option(help="factor on the merged update [default: the rule's own]")]
PolicyOption = Annotated[Literal["default", "paper"] | None, typer.Option(help="which tensors get the rule")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="output folder")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")]
ComputeDtype = Annotated[Literal["float32", "float64"] | None, typer.Option(help="type of the arithmetic")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(help="type of the output [default: the base's]"),
]
ShardSize = Annotated[str, typer.Option(help="largest output file")]
Workers = Annotated[int, typer.Option(help="tensors computed at once")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what the output folder holds")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="also read weights of torch.save, as data that is never run")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="also read weights in fp8, with their scales, as the values they stand for")
]
SplitQkv = Annotated[
    bool | None, typer.Option("--split-qkv", help="give the rule q, k and v one by one where they share a weight")
]
VocabularyOption = Annotated[
    str | None,
    typer.Option("--vocabulary", help="refuse other vocabularies, or match tokens: refuse, base or union"),
]
Force = Annotated[bool, typer.Option("--force", help="merge experts even if they do not seem to come from this base")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where a killed or interrupted run stopped")]
MaxMemory = Annotated[
    str | None, typer.Option(help="memory to stay within, as 8GB [default: (T + 4) x largest tensor]")
]
Seed = Annotated[int | None, typer.Option(help="seed of the rules that use chance")]
Nonfinite = Annotated[
    Literal["error", "skip-expert"] | None, typer.Option(help="what to do about NaN or infinity in an expert")
]
AsLora = Annotated[
    int | None, typer.Option(metavar="RANK", help="write one LoRA adapter of this rank instead of a model")
]
Push = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME", help="upload the output, once verified, to the Hub; a new repository is private"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but errors")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


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
        push: Push = None,
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
        }
        given = {key: value for key, value in keys.items() if value not in (None, [])}
        params = parse_settings(settings or [])
        if recipe is not None:
            asked = load_recipe(recipe, given, method, params)
        else:
            for key, option in (("base", "--base"), ("experts", "--expert")):
                if key not in given:
                    raise UsageError("command line", f"{option} is missing", f"give {option} or a recipe file")
            asked = make_recipe({**given, "method": {"name": method or "ace", **params}}, "command line")
        options = RunOptions(
            device, max_shard_size, workers, overwrite, resume, max_memory, allow_pickle, dequantize, force, quiet, push
        )
        action(asked, out, options, quiet)


def _merge(recipe: Recipe, out: Path | None, options: RunOptions, quiet: bool) -> None:
    """Merge a base and its experts into one folder."""
    if out is None:
        raise UsageError("command line", "-o is missing", "name the output folder with -o OUT")
    opened = open_recipe(recipe, out, options)  # downloads have a bar of their own
    with show.progress(err_console, quiet) as on_progress:
        report = api.run_opened(opened, out, options, on_progress)
    if not quiet:
        show.merge_summary(out_console, report)


def _plan(recipe: Recipe, out: Path | None, options: RunOptions, quiet: bool) -> None:
    """Show every tensor, its role, its rule and why; reads headers only."""
    opened = open_recipe(recipe, out, options)
    if not quiet:
        show.plan(out_console, opened.plan)


_merging_command(_merge)
_merging_command(_plan)


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
    with show.progress(err_console, quiet) as on_progress:
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
