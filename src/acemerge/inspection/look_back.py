"""A look back at a finished merge: its inputs and its output read once more, for what the manifest does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import locate_cached
from acemerge.checkpoints.links import contained
from acemerge.engine.applying import apply
from acemerge.engine.compute import SameInfinitiesError, task_vectors
from acemerge.engine.execute import OnProgress, walker
from acemerge.engine.opening import Opened, open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.engine.unfolding import as_seen
from acemerge.engine.work import Loaded, Place, Values, Work
from acemerge.errors import AcemergeError, UsageError
from acemerge.inspection.statistics import Sums, nothing, spectrum, sums
from acemerge.inspection.survey import FULL
from acemerge.methods.ace import Ace
from acemerge.methods.stats import LayerStats
from acemerge.output.records import records_of
from acemerge.planning.jobs import Merge
from acemerge.planning.pieces import Piece, pieces
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.shapes import Float, Tensor

BEFORE = "before refinement"


@dataclass(frozen=True)
class Probe:
    """What was seen of one tensor. `sums` are the experts'; `merged` (T + 1,) are `<D_t, M>` and then `<M, M>` for
    the merged update M; `spectra` are singular values by expert, "merged" and, where the rule refined, before that, of
    a tensor of this `shape`.
    """

    sums: Sums
    merged: Float[Tensor, " T_1"]
    spectra: Mapping[str, Float[Tensor, " k"]] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    @property
    def side(self) -> int:
        """How many singular values a matrix has."""
        return min(self.shape[-2:])

    @property
    def slices(self) -> int:
        """How many matrices there are."""
        return math.prod(self.shape[:-2])

    @property
    def agreement(self) -> Float[Tensor, " T"]:
        """The cosine between the merged update and each expert's; NaN where one of them is zero."""
        norms = (self.sums.energies * self.merged[-1]).sqrt()
        return (self.merged[:-1] / norms).clamp(-1, 1)

    def __add__(self, other: Probe) -> Probe:
        return replace(self, sums=self.sums + other.sums, merged=self.merged + other.merged)


@dataclass(frozen=True)
class LookBack:
    """What was seen of every tensor that a rule merged; `passed_over` are those whose rows are matched by token."""

    experts: tuple[str, ...]
    tensors: Mapping[str, Probe]
    passed_over: tuple[str, ...] = ()

    @property
    def total(self) -> Probe:
        T = len(self.experts)
        zero = Probe(nothing(T), torch.zeros(T + 1, dtype=torch.float64))
        return replace(sum(self.tensors.values(), zero), spectra={})


def look_back(out: Path, manifest: Mapping[str, Any], on_progress: OnProgress = lambda _: None) -> LookBack:
    """Read base, experts and output once. AcemergeError where they are not there any more, or are not the same."""
    recipe = _recipe(manifest)
    options = RunOptions(quiet=True, dequantize=bool(manifest.get("dequantized")))
    opened = open_recipe(recipe, None, options)
    # The output as one more expert: its update is the merged one.
    experts = [{"model": expert.model} for expert in recipe.experts]
    content = {"base": recipe.base, "experts": [*experts, {"model": str(out)}], "method": FULL.name}
    content |= {"vocabulary": recipe.vocabulary, "convolutions": recipe.convolutions}
    beside = open_recipe(make_recipe(content, "report"), None, options)
    refined = _refined(opened, manifest)
    tensors: dict[str, Probe] = {}
    jobs = [replace(job, method=FULL) for job in beside.plan.merged]
    with beside.pipeline(1, hashing=False) as (pipeline, _):
        walk = walker(pipeline, "report", on_progress)
        parts = (piece for job in jobs for piece in pieces(job, not job.is_matrix))
        for seen in walk(parts, _looking(beside, opened, refined)):
            for name, probe in seen:
                tensors[name] = tensors[name] + probe if name in tensors else probe
    return LookBack(tuple(manifest["experts"]), tensors, tuple(job.name for job in beside.plan.by_token))


def _recipe(manifest: Mapping[str, Any]) -> Recipe:
    """The recipe with its models where they were found, if they are still there and of the same size."""
    origins = [entry["path"] for entry in manifest["inputs"]]
    for entry in manifest["inputs"]:
        folder = locate_cached(entry["path"])
        if files.kind(folder) == "nothing":
            cure = "run it where the merge was run, with its models in folders"
            raise UsageError(entry["path"], "is not there", cure)
        for name, about in entry["files"].items():
            path = contained(files.resolve(folder), name) if files.kind(folder) == "folder" else folder
            if files.kind(path) != "file" or files.fingerprint(path)[0] != about["bytes"]:
                raise UsageError(path, "is not what was merged", "put the models back that the manifest names")
    content = dict(manifest["recipe"])
    given = [{**expert, "model": origin} for expert, origin in zip(content["experts"], origins[1:], strict=True)]
    return make_recipe({**content, "base": origins[0], "experts": given}, "manifest")


def _refined(opened: Opened, manifest: Mapping[str, Any]) -> dict[str, Merge]:
    """The jobs whose rule refined its result, as they were before that."""
    records = records_of(manifest)
    known = [job for job in opened.plan.merged if job.name in records]
    found = {job.name: before_refinement(job, records[job.name].stats) for job in known}
    return {name: job for name, job in found.items() if job is not None}


def before_refinement(job: Merge, stats: LayerStats) -> Merge | None:
    """The job without ACE's refinement, where its rule refined the tensor or a part of it, as it says in `stats`."""
    if isinstance(job.method, Ace) and any(part.refined for part in stats.parts):
        return replace(job, method=replace(job.method, ablation="E3"))
    return None


def _looking(beside: Opened, opened: Opened, refined: Mapping[str, Merge]) -> Work[Merge, list[tuple[str, Probe]]]:
    def work(loaded: Loaded[Merge], place: Place) -> list[tuple[str, Probe]]:
        about = beside, opened, refined, place
        seen = ((piece.job.name, _probe_unless_mask(piece, values, *about)) for piece, values in loaded)
        return [(name, probe) for name, probe in seen if probe is not None]

    return work


def _probe_unless_mask(
    piece: Piece[Merge], values: Values, beside: Opened, opened: Opened, refined: Mapping[str, Merge], place: Place
) -> Probe | None:
    try:
        return _probe(piece, values, beside, opened, refined, place)
    except SameInfinitiesError:
        return None


def _probe(
    piece: Piece[Merge], values: Values, beside: Opened, opened: Opened, refined: Mapping[str, Merge], place: Place
) -> Probe | None:
    job, labels = piece.job, opened.plan.experts
    T = len(labels)
    with place.space((T + 2, *piece.shape), job.compute_dtype) as space:
        W0 = space[T + 1].copy_(values.take((0, job.name)))
        deltas, _, used = task_vectors(piece, values, beside.setting, W0, space[: T + 1])
        if len(used) <= T:  # a part of a model has no say in what it lacks
            return None
        products = sums(deltas, W0).products[-1]
        own = sums(deltas[:T], W0)
        if not job.is_matrix:
            return Probe(own, products)
        seen = as_seen(job, deltas)
        spectra = {label: spectrum(D) for label, D in zip((*labels, "merged"), seen, strict=True)}
        if job.name in refined:
            result = apply(refined[job.name], deltas[:T], W0, range(T), opened.setting)
            spectra[BEFORE] = spectrum(as_seen(job, result.delta))
        return Probe(own, products, spectra, job.unfolded)


def try_to_look_back(
    out: Path, manifest: Mapping[str, Any], on_progress: OnProgress = lambda _: None
) -> tuple[LookBack | None, str]:
    """What was seen, or why it could not be."""
    try:
        return look_back(out, manifest, on_progress), ""
    except AcemergeError as failure:
        return None, str(failure)
