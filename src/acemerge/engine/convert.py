"""A checkpoint rewritten as plain safetensors: a merge of nothing, in which every tensor is the base's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import HEADS, is_head
from acemerge.checkpoints.float8 import plain
from acemerge.checkpoints.folder import Checkpoint, open_checkpoint
from acemerge.checkpoints.header import read_header
from acemerge.checkpoints.hub import locate
from acemerge.checkpoints.hub_files import from_cache
from acemerge.checkpoints.links import contained
from acemerge.engine.opening import Opened, check_output_apart
from acemerge.engine.run_options import RunOptions
from acemerge.errors import UsageError
from acemerge.models.roles import Roles, find_roles
from acemerge.models.tied_heads import heads_apart
from acemerge.output.folder import check_output
from acemerge.output.parts import holds_parts
from acemerge.planning.costs import budget
from acemerge.planning.jobs import Keep, Plan
from acemerge.recipes.recipe import Recipe
from acemerge.recipes.tables import TensorRule


def open_conversion(source: str, out: Path, options: RunOptions) -> Opened:
    """Open a checkpoint to be written to `out`, from headers alone. Raises CheckpointError, UsageError."""
    check_output_apart(out, [source])
    if not options.overwrite and holds_parts(out):
        cure = "choose another folder, or add --overwrite to remove them"
        raise UsageError(out, "holds parts of an unfinished merge, which no conversion continues", cure)
    check_output(out, options.overwrite, options.resume)
    with from_cache():
        model = locate(source, options.allow_pickle, options.quiet, heads=True, stream=options.stream)
        checkpoint = _with_heads(open_checkpoint(model.path, options.allow_pickle, options.dequantize))
    _, roles, _ = heads_apart([checkpoint], ["base"], find_roles(checkpoint.config, checkpoint.tensors))
    # Without an expert this is no recipe that could be asked for: it is not validated as one.
    recipe = Recipe.model_construct(base=source, experts=[], rules=(TensorRule(match="*", action="base"),))
    dequantized = {"base": checkpoint.float8} if checkpoint.float8 else {}
    plan = Plan(recipe, (), _jobs(checkpoint, roles), (), roles.source, (), dequantized=dequantized)
    devices, shard = (torch.device("cpu"),), options.max_shard_size
    return Opened(plan, roles, checkpoint, (), (checkpoint,), (model.origin,), devices, shard, budget(plan, None))


def _with_heads(checkpoint: Checkpoint) -> Checkpoint:
    """With the task heads that lie beside a merged model, as files that are copied as they are."""
    root = files.resolve(checkpoint.path)
    if files.kind(root / HEADS) != "folder":
        return checkpoint
    names = [name for name in (f"{HEADS}/{file}" for file in files.list_folder(root / HEADS)) if is_head(name)]
    for name in names:
        read_header(contained(root, name))  # refuses what breaks the format
    return replace(checkpoint, assets=(*checkpoint.assets, *names))


def _jobs(checkpoint: Checkpoint, roles: Roles) -> tuple[Keep, ...]:
    """One job per tensor. A tied one is written once, under its first name; that the others agree is checked."""
    jobs = []
    for first, *others in roles.group(checkpoint.tensors).values():
        stored = checkpoint.tensors[first]
        spec = plain(stored, checkpoint.config)
        copies = tuple((0, other) for other in others)
        widens, nbytes = spec != stored, stored.nbytes * (1 + len(copies))
        reason = "dequantised" if widens else "as it is"
        jobs.append(Keep(spec, roles.by_name[first], reason, copies=copies, widens=widens, bytes_in=nbytes))
    return tuple(jobs)
