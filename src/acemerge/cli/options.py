"""Options that several commands have, and the recipe that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from acemerge.errors import UsageError
from acemerge.recipes.recipe import Recipe, load_recipe, make_recipe, parse_settings

RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="recipe file")]
Base = Annotated[str | None, typer.Option(help="folder or Hub id (org/name@revision) that all experts come from")]
Experts = Annotated[list[str] | None, typer.Option("--expert", help="an expert's folder or Hub id; repeat for each")]
MethodName = Annotated[
    str | None, typer.Option(help="merge rule, see `acemerge methods`; auto: the one recommended [default: ace]")
]
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
Calibration = Annotated[
    str | None, typer.Option(metavar="TASKS.yaml", help="tasks of the experts, for the rules that need data")
]
Push = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME", help="upload the output, once verified, to the Hub; a new repository is private"),
]
Report = Annotated[bool, typer.Option("--report", help="write OUT/report.html too; reads the models once more")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but errors")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def asked_recipe(
    file: Path | None,
    keys: Mapping[str, Any],
    method: str | None,
    settings: Sequence[str] | None,
    allow_pickle: bool = False,
) -> Recipe:
    """The recipe of a file with the options' keys over it, or of the options alone; those not given are None."""
    given = {key: value for key, value in keys.items() if value not in (None, [])}
    params = parse_settings(list(settings or []))
    if file is not None:
        return load_recipe(file, given, method, params, allow_pickle)
    for key, option in (("base", "--base"), ("experts", "--expert")):
        if key not in given:
            raise UsageError("command line", f"{option} is missing", f"give {option} or a recipe file")
    return make_recipe({**given, "method": {"name": method or "ace", **params}}, "command line")
