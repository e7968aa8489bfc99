"""The one path from a recipe to a merged model that the command line and Python share."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import CONFIG, Checkpoint, contained, open_checkpoint
from acemerge.checkpoints.writer import CARD, OutputFolder, output_folder
from acemerge.compute import Inputs
from acemerge.errors import UsageError
from acemerge.plan import Plan, expert_labels, make_plan
from acemerge.recipe import Recipe, make_recipe, parse_size, with_params
from acemerge.report.card import model_card
from acemerge.report.manifest import build_manifest, to_bytes
from acemerge.roles import find_roles
from acemerge.run import OnProgress, computed_in_order, hashing, write_model
from acemerge.thresholds import with_thresholds


@dataclass(frozen=True)
class RunOptions:
    """What decides how a recipe is run, but not the values that come out."""

    device: str = "cpu"
    max_shard_size: str = "5GB"
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `manifest` is the table that `acemerge.json` holds; `out` is None for a dry run."""

    out: Path | None
    manifest: Mapping[str, Any]

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """For every tensor: role, rule, reason, status and the rule's own numbers."""
        tensors: Mapping[str, Mapping[str, Any]] = self.manifest["tensors"]
        return tensors


@dataclass(frozen=True)
class Opened:
    """A recipe with its checkpoints opened and its plan made; no tensor bytes read yet."""

    plan: Plan
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    device: torch.device
    max_shard: int

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts)


def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    method: str | Mapping[str, Any] = "ace",
    out: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merge checkpoint folders into the folder `out`; without `out`, compute everything and write nothing.

    Args:
        base: folder of the model that all experts were fine-tuned from.
        experts: their folders.
        method: a rule's name, or a table with `name` and its parameters.
        options: fields of the recipe (`scale`, `policy`, `dtype`, ...), of `RunOptions` (`device`, `workers`,
            `overwrite`, `max_shard_size`), `weights` for the experts, and parameters of the rule (`eps=1e-4`).

    Raises AcemergeError: UsageError, CheckpointError, NumericalError or WriteError.
    """
    run_fields = {name: options.pop(name) for name in list(options) if name in RunOptions.__dataclass_fields__}
    if isinstance(experts, str | Path):
        raise UsageError("experts", f"{experts} is one path", "give a list of paths")
    weights = options.pop("weights", None) or [1.0] * len(experts)
    if len(weights) != len(experts):
        raise UsageError("weights", f"{len(weights)} weights for {len(experts)} experts", "give one weight each")
    own = {name: options.pop(name) for name in list(options) if name in Recipe.model_fields}
    spec = with_params(method, options)
    pairs = [{"model": str(path), "weight": weight} for path, weight in zip(experts, weights, strict=True)]
    recipe = make_recipe({"base": str(base), "experts": pairs, "method": spec, **own}, "merge")
    return run_recipe(recipe, None if out is None else Path(out), RunOptions(**run_fields))


def open_recipe(recipe: Recipe, out: Path | None, options: RunOptions) -> Opened:
    """Check the options, open the checkpoints and plan the merge, from headers alone."""
    if out is not None:
        _check_output_apart(out, [recipe.base, *(expert.model for expert in recipe.experts)])
    if options.workers < 1:
        raise UsageError("--workers", f"{options.workers} is not a number of workers", "use 1 or more")
    device, max_shard = _device(options.device), parse_size(options.max_shard_size)
    base = open_checkpoint(Path(recipe.base))
    experts = tuple(open_checkpoint(Path(expert.model)) for expert in recipe.experts)
    labels = expert_labels([expert.model for expert in recipe.experts])
    # The experts' own names too: a tied tensor may have its other spelling there only.
    specs = {name: spec for source in (*reversed(experts), base) for name, spec in source.tensors.items()}
    plan = make_plan(recipe, base, experts, labels, find_roles(base.config, specs))
    return Opened(plan, base, experts, device, max_shard)


def run_recipe(
    recipe: Recipe, out: Path | None, options: RunOptions, on_progress: OnProgress = lambda _: None
) -> MergeReport:
    """Plan and execute a recipe; without `out` compute everything and write nothing."""
    opened = open_recipe(recipe, out, options)
    plan, started = opened.plan, time.perf_counter()
    inputs = Inputs(recipe, opened.base, opened.experts, plan.experts, opened.device)
    paths = [str(checkpoint.path) for checkpoint in opened.checkpoints]
    if out is None:
        inputs = with_thresholds(inputs, plan, options.workers)
        results = computed_in_order(plan.jobs, inputs, options.workers, on_progress)
        records = {job.name: result.record for job, result in results}
        return MergeReport(None, build_manifest(plan, records, [(p, {}) for p in paths], {}, _since(started)))
    with output_folder(out, options.overwrite) as output, hashing(opened.checkpoints) as input_sums:
        inputs = with_thresholds(inputs, plan, options.workers)
        written = write_model(plan, inputs, output, opened.max_shard, options.workers, on_progress)
        _write_assets(opened.base, plan, output)
        output.write_bytes(CARD, model_card(plan, written).encode())
        sums = input_sums()
        for checkpoint in opened.checkpoints:
            checkpoint.check_unchanged()
        provenance = list(zip(paths, sums, strict=True))
        manifest = build_manifest(plan, written, provenance, dict(output.written), _since(started))
        output.publish(to_bytes(manifest))
    return MergeReport(out, manifest)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _check_output_apart(out: Path, inputs: Sequence[str]) -> None:
    """UsageError when the output folder is, holds or lies in an input."""
    with files.writing(out):
        target = out.resolve()
    for path in inputs:
        with files.reading(Path(path)):
            source = Path(path).resolve()
        if target == source or target.is_relative_to(source) or source.is_relative_to(target):
            what = f"is the same folder as, inside or around the input {path}"
            raise UsageError(out, what, "choose a folder of its own for the output")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise UsageError(f"--device {name}", "unknown device", "use cpu, cuda, cuda:N or auto")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}", "no CUDA device is available", "use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}", "unknown device", "use cpu, cuda, cuda:N or auto") from None


def _write_assets(base: Checkpoint, plan: Plan, output: OutputFolder) -> None:
    """The base's configuration, tokenizer and processor files; the config follows a forced output type."""
    root = base.path.resolve()
    for name in base.assets:
        source = contained(root, name)
        if name == CONFIG and plan.recipe.dtype != "auto":
            config = {k: v for k, v in base.config.items() if k not in ("dtype", "torch_dtype")}
            key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
            text = json.dumps({**config, key: plan.recipe.dtype}, indent=2)
            output.write_bytes(name, text.encode() + b"\n")
        else:
            output.write_chunks(name, files.read_chunks(source))
