"""Every option that commands share, declared once: its type, its help, its group. A command lists which it takes.

Nothing here imports the engine: help and usage errors must not wait for torch.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from acemerge.checkpoints.named import folder_path
from acemerge.errors import UsageError

if TYPE_CHECKING:
    from acemerge.engine.run_options import RunOptions
    from acemerge.recipes.recipe import Recipe

# The groups of a command's help, in their order.
MODELS, RULE, READING, OUTPUT, RUNNING, SAYING = GROUPS = (
    "Models",
    "Rule",
    "Reading models",
    "Output",
    "Running",
    "What is said",
)
T = TypeVar("T")


def option(group: str, text: str, *names: str, **more: Any) -> Any:
    """An option in a group of the help."""
    return typer.Option(*names, help=text, rich_help_panel=group, **more)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for; an option that a command does not take, or that was not given, has its default here."""

    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="recipe file")] = None
    base: Annotated[
        str | None,
        option(MODELS, "folder, Hub id (org/name@revision) or address that all experts come from", metavar="MODEL"),
    ] = None
    expert: Annotated[
        list[str] | None,
        option(
            MODELS,
            "an expert's folder, Hub id or address; PATH=0.5 gives it a weight; repeat for each",
            "--expert",
            metavar="MODEL",
        ),
    ] = None
    weights: Annotated[
        str | None, option(MODELS, "the experts' weights, in their order, such as 1,0.5", metavar="W,W,...")
    ] = None
    method: Annotated[
        str | None,
        option(RULE, "merge rule, see `acemerge methods` [default: auto, the one recommended]", metavar="NAME"),
    ] = None
    settings: Annotated[
        list[str] | None, option(RULE, "a parameter of the rule; repeat for each", "--set", metavar="KEY=VALUE")
    ] = None
    scale: Annotated[float | None, option(RULE, "factor on the merged update [default: the rule's own]")] = None
    policy: Annotated[Literal["default", "paper"] | None, option(RULE, "which tensors get the rule")] = None
    convolutions: Annotated[
        Literal["average", "rule"] | None,
        option(RULE, "average convolutions wider than 1 x 1, or take them for layers of patches"),
    ] = None
    split_qkv: Annotated[
        bool | None, option(RULE, "give the rule q, k and v one by one where they share a weight", "--split-qkv")
    ] = None
    join_qkv: Annotated[
        bool | None, option(RULE, "give the rule q, k and v as one where they are stored apart", "--join-qkv")
    ] = None
    seed: Annotated[int | None, option(RULE, "seed of the rules that use chance")] = None
    calibration: Annotated[
        str | None,
        option(RULE, "tasks of the experts, for rules that need data; self: text they write", metavar="TASKS.yaml"),
    ] = None
    compute_dtype: Annotated[
        Literal["float32", "float64"] | None, option(RULE, "type of the arithmetic [default: float32]")
    ] = None
    vocabulary: Annotated[
        Literal["refuse", "base", "union", "assets"] | None,
        option(READING, "refuse other vocabularies, or match tokens [default: refuse]"),
    ] = None
    nonfinite: Annotated[
        Literal["error", "skip-expert"] | None, option(READING, "what to do about NaN or infinity in an expert")
    ] = None
    force: Annotated[
        bool, option(READING, "merge experts even if they do not seem to come from this base", "--force")
    ] = False
    allow_pickle: Annotated[
        bool, option(READING, "also read weights of torch.save, as data that is never run", "--allow-pickle")
    ] = False
    dequantize: Annotated[
        bool,
        option(READING, "also read weights in fp8, with their scales, as the values they stand for", "--dequantize"),
    ] = False
    stream: Annotated[
        bool, option(READING, "read models of the Hub by byte ranges, and keep no copy of them", "--stream")
    ] = False
    hash_files: Annotated[
        bool, option(READING, "note the hash of every input file as a whole, too, by reading it once more")
    ] = False
    out: Annotated[
        Path | None, option(OUTPUT, "output folder or address", "-o", "--out", metavar="PATH", parser=folder_path)
    ] = None
    overwrite: Annotated[bool, option(OUTPUT, "replace what the output folder holds", "--overwrite")] = False
    resume: Annotated[bool, option(OUTPUT, "continue where a killed or interrupted run stopped", "--resume")] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        option(OUTPUT, "type of the output [default: the base's]"),
    ] = None
    max_shard_size: Annotated[str | None, option(OUTPUT, "largest output file [default: 5GB]", metavar="SIZE")] = None
    as_lora: Annotated[
        int | None, option(OUTPUT, "write one LoRA adapter of this rank instead of a model", metavar="RANK")
    ] = None
    compress: Annotated[
        Literal["first", "last"] | None,
        option(OUTPUT, "with --as-lora: to its rank before adapters are merged, or after [default: last]"),
    ] = None
    push: Annotated[
        str | None,
        option(OUTPUT, "upload the output, once verified, to the Hub; a new repository is private", metavar="ORG/NAME"),
    ] = None
    report: Annotated[bool, option(OUTPUT, "write OUT/report.html too; reads the models once more", "--report")] = False
    shard: Annotated[
        str | None,
        option(RUNNING, "compute part K of N of the output's files only, on this machine", metavar="K/N"),
    ] = None
    finish: Annotated[bool, option(RUNNING, "put together what --shard 1/N to N/N have computed", "--finish")] = False
    ray: Annotated[
        str | None,
        option(
            RUNNING, "compute all parts on a Ray cluster: HOST:PORT, auto (where one runs), local", metavar="ADDRESS"
        ),
    ] = None
    device: Annotated[
        str, option(RUNNING, "cpu, auto, or cuda, xpu, mps, with :N for one of several", metavar="NAME")
    ] = "cpu"
    workers: Annotated[int, option(RUNNING, "tensors computed at once")] = 1
    max_memory: Annotated[
        str | None, option(RUNNING, "memory to stay within, as 8GB [default: (T + 4) x largest tensor]", metavar="SIZE")
    ] = None
    every: Annotated[bool, option(SAYING, "list every tensor, without grouping layers", "--all")] = False
    as_json: Annotated[bool, option(SAYING, "print one JSON object, and nothing else on stdout", "--json")] = False
    log_format: Annotated[
        Literal["text", "json"], option(SAYING, "what stderr gets: words, or one line of JSON for each event")
    ] = "text"
    quiet: Annotated[bool, option(SAYING, "print nothing but errors", "--quiet")] = False
    debug: Annotated[bool, option(SAYING, "show the traceback of an error", "--debug")] = False

    @property
    def logs(self) -> bool:
        """Whether stderr gets a line for each event."""
        return self.log_format == "json" and not self.quiet

    @property
    def silent(self) -> bool:
        """Whether nobody wants to see on stderr how the work gets on."""
        return self.quiet or self.logs

    def run_options(self) -> RunOptions:
        """How to run it; what was not given is left to the defaults there."""
        from acemerge.engine.run_options import RunOptions, make_options

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunOptions)}
        return make_options({name: value for name, value in given.items() if value is not None})

    @property
    def output(self) -> Path:
        """The output folder; UsageError where none is named."""
        return needed(self.out, "-o", "name the output folder with -o OUT")

    def check_models(self) -> None:
        """UsageError where neither a recipe file nor options name models: known before anything is imported."""
        if self.recipe is None:
            needed(self.base, "--base", "give --base or a recipe file")
            needed(self.expert or None, "--expert", "give --expert or a recipe file")

    def experts(self) -> list[Any]:
        """Those of --expert, as a recipe has them."""
        from acemerge.recipes.recipe import parse_expert

        return [parse_expert(text) for text in self.expert or []]

    def asked_recipe(self) -> Recipe:
        """The recipe of a file with the options' keys over it, or of the options alone."""
        from acemerge.methods import DEFAULT
        from acemerge.recipes.recipe import (
            Recipe,
            load_recipe,
            make_recipe,
            parse_settings,
            parse_weights,
            with_weights,
        )

        shared = {field.name for field in dataclasses.fields(self)} & Recipe.model_fields.keys() - {"method"}
        keys: dict[str, Any] = {"experts": self.experts(), **{name: getattr(self, name) for name in shared}}
        given = {key: value for key, value in keys.items() if value not in (None, [])}
        params = parse_settings(list(self.settings or []))
        weights = None if self.weights is None else parse_weights(self.weights)
        if weights and any(isinstance(expert, dict) for expert in given.get("experts", [])):
            raise UsageError("--weights", "an --expert has a weight, too", "give the weights in one place")
        if self.recipe is not None:
            return load_recipe(self.recipe, given, self.method, params, weights, self.allow_pickle)
        given["experts"] = with_weights(given["experts"], weights, "--weights")
        try:
            return make_recipe({**given, "method": {"name": self.method or DEFAULT, **params}}, "command line")
        except UsageError as failure:
            options = {"experts", *(field.name for field in dataclasses.fields(self))}
            named = [key for key in Recipe.model_fields.keys() - options if re.search(rf"\b{key}\b", failure.cure)]
            notes = "".join(f" ({key} is a key of a recipe file)" for key in sorted(named))
            raise UsageError(failure.where, failure.what, f"{failure.cure}{notes}") from None


# What commands take that read models by a recipe, that choose how to merge them, that write the result; and of those
# whose result machines may want.
LOOKING = (
    "recipe", "base", "expert", "method", "settings", "policy", "convolutions", "compute_dtype", "vocabulary",
    "nonfinite", "allow_pickle", "dequantize", "stream", "device", "workers", "max_memory", "calibration",
)  # fmt: skip
CHOOSING = ("weights", "scale", "split_qkv", "join_qkv", "seed")
WRITING = (
    "force",
    "hash_files",
    "out",
    "overwrite",
    "resume",
    "dtype",
    "max_shard_size",
    "as_lora",
    "compress",
    "push",
    "report",
    "shard",
    "finish",
    "ray",
)
TELLING = ("as_json", "log_format", "quiet")
MERGING = (*LOOKING, *CHOOSING, *WRITING, *TELLING)


def needed(value: T | None, name: str, cure: str) -> T:
    """The value of an option that the command cannot do without."""
    if value is None:
        raise UsageError("command line", f"{name} is missing", cure)
    return value
