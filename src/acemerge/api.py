"""The one path from a recipe to a merged model that the command line and Python share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from typing_extensions import Unpack

from acemerge.calibration.calibrate import data_of
from acemerge.checkpoints import named
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.engine.events import event_fields, logged
from acemerge.engine.execute import (
    OnProgress,
    Progress,
)
from acemerge.engine.executor import Executor, Here
from acemerge.engine.in_parts import compute_parts, machines_of, parts_to_do, put_together
from acemerge.engine.merge_options import MergeOptions
from acemerge.engine.on_ray import on_ray
from acemerge.engine.opening import Opened, identity_of, open_recipe
from acemerge.engine.parts import compute_part
from acemerge.engine.relatedness import check_related
from acemerge.engine.run_options import RunOptions, make_options
from acemerge.errors import (
    CheckpointError,
    LockedError,
    NumericalError,
    ResourceError,
    UsageError,
    addressed,
    shortages,
)
from acemerge.inspection.afterwards import how_far
from acemerge.linalg.threads import check_room
from acemerge.methods import AnyMethod
from acemerge.methods.registry import check_names
from acemerge.output.manifest import InputFile, build_manifest, to_bytes
from acemerge.output.merge_report import MergeReport
from acemerge.output.parts import holds_parts
from acemerge.output.place import output_at
from acemerge.output.protocol import Output
from acemerge.output.same_run import is_finished
from acemerge.output.upload import upload
from acemerge.output.verify import verify
from acemerge.recipes.recipe import Recipe, make_recipe, with_params, with_weights
from acemerge.report.html import check_libraries
from acemerge.report.write import write_report
from acemerge.runs import Begun, begin, compute_only, write

log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds


@overload
def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    method: AnyMethod = ...,
    out: str | Path | None = ...,
    **options: Unpack[MergeOptions],
) -> MergeReport: ...
@overload
def merge(  # with parameters of the rule
    base: str | Path,
    experts: Sequence[str | Path],
    method: AnyMethod = ...,
    out: str | Path | None = ...,
    **options: Any,
) -> MergeReport: ...
def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    method: AnyMethod = "auto",
    out: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merge checkpoints into the folder `out`; without `out`, compute everything and write nothing.

    Args:
        base: the model that all experts were fine-tuned from, by its folder or its Hub id (`org/name@revision`).
        experts: the same of each expert.
        method: a rule's name, a table with `name` and its parameters, or an instance of a rule.
        options: those of `MergeOptions`, and parameters of the rule (`eps=1e-4`): fields of the recipe (`scale`,
            `policy`, `dtype`, ...), of `RunOptions` (`device`, `workers`, `overwrite`, `resume`, `max_shard_size`,
            `max_memory`, `allow_pickle`, `dequantize`, `force`, `quiet`, `push`, `report`, `shard`, `finish`,
            `ray`, `stream`, `hash_files`),
            `weights` for the experts, and `on_progress`, a function that is told how far the merge is, by a
            `Progress`.

    Raises AcemergeError: UsageError, CheckpointError, NumericalError, ResourceError or WriteError.
    """
    run_fields = {name: options.pop(name) for name in list(options) if name in RunOptions.__dataclass_fields__}
    if isinstance(experts, str | Path):
        raise UsageError("experts", f"{experts} is one path", "give a list of paths")
    on_progress = options.pop("on_progress", None) or _nobody
    if not callable(on_progress):
        what = f"{on_progress!r} cannot be called"
        raise UsageError("on_progress", what, "give a function of one argument")
    weighted = with_weights([str(path) for path in experts], options.pop("weights", None))
    own = {name: options.pop(name) for name in list(options) if name in Recipe.model_fields}
    check_names(method, options, list(MergeOptions.__annotations__))
    if isinstance(own.get("calibration"), Path):
        own["calibration"] = str(own["calibration"])
    spec = with_params(method, options)
    recipe = make_recipe({"base": str(base), "experts": weighted, "method": spec, **own}, "merge")
    target = None if out is None else named.output_path(out)
    return run_recipe(recipe, target, make_options(run_fields), on_progress)


def _nobody(_: Progress) -> None:
    pass


def run_recipe(recipe: Recipe, out: Path | None, options: RunOptions, on_progress: OnProgress = _nobody) -> MergeReport:
    """Plan and execute a recipe; without `out` compute everything and write nothing."""
    if out is None and (options.push is not None or options.asked_for_parts is not None):
        name, what = ("push", "to upload") if options.push is not None else ("shard", "for parts to write to")
        raise UsageError(name, f"there is no output {what}", "name the output folder with `out`")
    with shortages():
        opened = open_recipe(recipe, out, options)
    return run_opened(opened, out, options, on_progress)


def run_opened(opened: Opened, out: Path | None, options: RunOptions, on_progress: OnProgress = _nobody) -> MergeReport:
    """Execute what was opened and planned; with `push`, verify the output and upload it."""
    with shortages():
        return _run(opened, out, options, on_progress)


def _run(opened: Opened, out: Path | None, options: RunOptions, on_progress: OnProgress) -> MergeReport:
    plan, started = opened.plan, time.perf_counter()
    check_room(torch.get_num_threads())
    on_progress = logged(log, on_progress)
    log.info("%d tensors of %d experts", len(plan.jobs), len(plan.experts), extra=event_fields("started", out=out))
    for warning in plan.warnings:
        log.warning(warning, extra=event_fields("warning"))
    if options.report:
        check_libraries()
    if not options.force:
        check_related(plan, opened.base, opened.experts)
    about = identity_of(opened, options.device if options.ray is None else "cpu")
    about |= {"calibration": data_of(plan, opened.calibration)} if opened.calibration else {}
    if out is None:
        records, measured = compute_only(opened, options, about, on_progress)
        unread: list[tuple[str, dict[str, InputFile]]] = [(origin, {}) for origin in opened.origins]
        manifest = build_manifest(plan, records, unread, {}, _since(started)) | measured
        return MergeReport(None, manifest | _with_surprises(manifest))
    if opened.part is not None:
        return _part(opened, out, about, options, on_progress)
    if options.ray is not None or (options.resume and not options.finish and holds_parts(out)):
        return _in_parts(opened, out, about, options, on_progress)
    with output_at(out, options.overwrite, options.resume, options.finish) as output:
        if options.finish:
            manifest = put_together(opened, output, about, options.hash_files)
        else:
            begun = begin(opened, out, output, about, options)
            if begun is None:
                return _was_complete(out, output, options, on_progress)
            (manifest,) = write([begun], options, on_progress)
        return _published(out, output, manifest, started, options, on_progress)


def run_together(runs: Sequence[tuple[Opened, Path]], options: RunOptions) -> None:
    """Execute plans for the same models, opened by `open_recipes`, in one pass over their files.

    Each output gets the bytes of `run_opened`. Those for which the experts' networks are run go by themselves; so do
    all where a rule fails, for it must not take with it what the ones before it do, or where memory is short.
    """
    together = [run for run in runs if not run[0].calibration]
    apart = [run for run in runs if run[0].calibration]
    try:
        with shortages():
            _run_together(together, options)
    except (CheckpointError, NumericalError, ResourceError):
        apart = list(runs)
    for opened, out in apart:
        run_opened(opened, out, options)


def _run_together(runs: Sequence[tuple[Opened, Path]], options: RunOptions) -> None:
    """What of these is not done yet."""
    started = time.perf_counter()
    check_room(torch.get_num_threads())
    with contextlib.ExitStack() as stack:
        begun: list[tuple[Path, Begun]] = []
        for opened, out in runs:
            for warning in opened.plan.warnings:
                log.warning(warning, extra=event_fields("warning"))
            if not options.force:
                check_related(opened.plan, opened.base, opened.experts)
            about = identity_of(opened, options.device)
            output = stack.enter_context(output_at(out, options.overwrite, options.resume))
            one = begin(opened, out, output, about, options)
            if one is None:
                _was_complete(out, output, options, _nobody)
            else:
                begun.append((out, one))
        manifests = write([one for _, one in begun], options, _nobody) if begun else []
        for (out, one), manifest in zip(begun, manifests, strict=True):
            _published(out, one.output, manifest, started, options, _nobody)


def _in_parts(
    opened: Opened, out: Path, about: Mapping[str, Any], options: RunOptions, on_progress: OnProgress
) -> MergeReport:
    """Have an executor compute all parts that are not done, and put them together."""
    started = time.perf_counter()
    with _executor(opened, out, about, options) as executor:
        with contextlib.ExitStack() as stack:
            output = _held_when_free(stack, out, options)
            about = machines_of(executor, output, about)
            if options.resume and is_finished(out, about, options.overwrite):
                return _was_complete(out, output, options, on_progress)
            parts = parts_to_do(opened, output, about, options.resume, executor.slots)
        compute_parts(opened, out, parts, executor, options, on_progress)
    with output_at(out, options.overwrite, in_parts=True) as output:
        manifest = put_together(opened, output, about, options.hash_files)
        return _published(out, output, manifest, started, options, on_progress)


def _held_when_free(stack: contextlib.ExitStack, out: Path, options: RunOptions) -> Output:
    """The output, held. One that is gone on with may still be held by parts of a driver that was killed: Ray ends them
    when it learns of that.
    """
    until = time.monotonic() + (_PATIENCE if options.resume else 0.0)
    while True:
        try:
            return stack.enter_context(output_at(out, options.overwrite, options.resume, options.resume))
        except LockedError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def _executor(
    opened: Opened, out: Path, about: Mapping[str, Any], options: RunOptions
) -> contextlib.AbstractContextManager[Executor]:
    if options.ray is not None:
        return on_ray(opened, out, options)
    return contextlib.nullcontext(Here(opened, out, about, options))


def _was_complete(out: Path, output: Output, options: RunOptions, on_progress: OnProgress) -> MergeReport:
    """The report of a run that was published before it was killed."""
    output.discard()
    log.info("%s was complete: verifying it", addressed(out), extra=event_fields("complete", out=out))
    return replace(_finished(out, verify(out), options, on_progress), was_complete=True)


def _published(
    out: Path,
    output: Output,
    manifest: dict[str, Any],
    started: float,
    options: RunOptions,
    on_progress: OnProgress,
) -> MergeReport:
    manifest |= {"seconds": _since(started), **_with_surprises(manifest)}
    output.publish(to_bytes(manifest))
    return _finished(out, manifest if options.push is None else verify(out), options, on_progress)


def _with_surprises(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is only known when all was read: how far the merge goes, and more warnings behind those of the plan."""
    length, found = how_far(manifest)
    for warning in found:
        log.warning(warning, extra=event_fields("warning"))
    return {"length": None if length is None else length.to_json(), "warnings": [*manifest["warnings"], *found]}


def _finished(out: Path, manifest: Mapping[str, Any], options: RunOptions, on_progress: OnProgress) -> MergeReport:
    """The report of an output that is there and, where it is to be uploaded, was verified."""
    report = MergeReport(out, manifest)
    written = event_fields("finished", out=out, bytes=report.bytes_written, seconds=manifest["seconds"])
    log.info("%s is complete: %d tensors", addressed(out), len(report.tensors), extra=written)
    if options.report:
        write_report(out, on_progress=on_progress)
    if options.push is None:
        return report
    address = upload(out, [*manifest["outputs"], MANIFEST], options.push, options.quiet, options.finish)
    log.info("uploaded to %s", address, extra=event_fields("pushed", address=address))
    return replace(report, pushed=address)


def _part(
    opened: Opened, out: Path, about: Mapping[str, Any], options: RunOptions, on_progress: OnProgress
) -> MergeReport:
    """Compute a part, and report of its tensors and files alone. There is no manifest until all are put together."""
    started = time.perf_counter()
    found, was_done = compute_part(opened, out, about, options, on_progress)
    unread: list[tuple[str, dict[str, InputFile]]] = [(origin, {}) for origin in opened.origins]
    manifest = build_manifest(opened.plan, found.records, unread, found.written, _since(started))
    log.info("part %s of %s is done", opened.part, out, extra=event_fields("part", out=out, part=str(opened.part)))
    return MergeReport(out, manifest, was_complete=was_done, part=str(opened.part))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
