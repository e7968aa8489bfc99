"""The one path from a recipe to a merged model that the command line and Python share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from typing_extensions import Unpack

from acemerge.calibration.calibrate import Calibrating, about_calibration, calibrated, data_of
from acemerge.checkpoints import files
from acemerge.checkpoints.assets import with_asset_folders
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.lora import ADAPTER_CONFIG
from acemerge.checkpoints.reader import Reader, check_unchanged
from acemerge.engine.execute import (
    OnProgress,
    Progress,
    Records,
    check_heads,
    dry_run,
    find_thresholds,
    walker,
    write_heads,
    write_weights,
)
from acemerge.engine.merge_options import MergeOptions
from acemerge.engine.opening import Opened, RunOptions, make_options, open_recipe
from acemerge.engine.thresholds import with_thresholds
from acemerge.errors import CheckpointError, UsageError, shortages
from acemerge.inspection.advice import of_frozen
from acemerge.linalg.threads import check_room
from acemerge.methods import AnyMethod
from acemerge.output.assets import write_assets
from acemerge.output.card import model_card
from acemerge.output.folder import CARD, MANIFEST, PICTURE, OutputFolder, output_folder
from acemerge.output.identity import difference, digest, identity, with_same_bytes
from acemerge.output.journal import JOURNAL, Done, read_journal
from acemerge.output.manifest import build_manifest, load_manifest, to_bytes
from acemerge.output.merge_report import MergeReport
from acemerge.output.origin import Origin, origin_of
from acemerge.output.picture import shares_picture
from acemerge.output.records import records_of
from acemerge.output.shares import energies_of, layer_shares, total_energies
from acemerge.output.upload import upload
from acemerge.output.verify import verify
from acemerge.output.writer import FileSum
from acemerge.planning.as_lora import adapter_config
from acemerge.planning.relatedness import check_related
from acemerge.recipes.recipe import Recipe, make_recipe, with_params, with_weights
from acemerge.report.html import check_libraries
from acemerge.report.write import write_report

log = logging.getLogger(__name__)


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
    method: AnyMethod = "ace",
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
            `max_memory`, `allow_pickle`, `dequantize`, `force`, `quiet`, `push`, `report`), `weights` for the experts,
            and `on_progress`, a function that is told how far the merge is, by a `Progress`.

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
    if isinstance(own.get("calibration"), Path):
        own["calibration"] = str(own["calibration"])
    spec = with_params(method, options)
    recipe = make_recipe({"base": str(base), "experts": weighted, "method": spec, **own}, "merge")
    target = None if out is None else files.output_path(out)
    return run_recipe(recipe, target, make_options(run_fields), on_progress)


def _nobody(_: Progress) -> None:
    pass


def run_recipe(recipe: Recipe, out: Path | None, options: RunOptions, on_progress: OnProgress = _nobody) -> MergeReport:
    """Plan and execute a recipe; without `out` compute everything and write nothing."""
    if out is None and options.push is not None:
        raise UsageError("push", "there is no output to upload", "name the output folder with `out`")
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
    on_progress = _logged(on_progress)
    log.info("%d tensors of %d experts", len(plan.jobs), len(plan.experts), extra=_fields("started", out=out))
    for warning in plan.warnings:
        log.warning(warning, extra=_fields("warning"))
    if options.report:
        check_libraries()
    if not options.force:
        check_related(plan, opened.base, opened.experts)
    about = identity(plan.recipe, opened.models, opened.origins, opened.max_shard, options.device)
    about |= {"calibration": data_of(opened)} if opened.calibration else {}
    if out is None:
        records, measured = _dry_run(opened, options, about, on_progress)
        unread: list[tuple[str, dict[str, FileSum]]] = [(origin, {}) for origin in opened.origins]
        manifest = build_manifest(plan, records, unread, {}, _since(started)) | measured
        return MergeReport(None, manifest | _with_surprises(manifest))
    with output_folder(out, options.overwrite, options.resume) as output:
        done = Done(about)
        if options.resume:
            if _is_finished(out, about, options.overwrite):
                output.discard()
                log.info("%s was complete: verifying it", out, extra=_fields("complete", out=out))
                return replace(_finished(out, verify(out), options, on_progress), was_complete=True)
            done = read_journal(out, opened.layout.files) or done
            models = list(zip(opened.origins, opened.models, strict=True))
            # What was measured on data came of models that were not hashed.
            before = with_same_bytes(done.identity, about, models, {} if opened.calibration else done.read)
            _check_same_run(out, before, about)
            done = replace(done, identity=about)
        manifest = _write(opened, output, done, options, on_progress)
        manifest |= {"seconds": _since(started), "run": digest(about), **_with_surprises(manifest)}
        output.publish(to_bytes(manifest))
        return _finished(out, manifest if options.push is None else verify(out), options, on_progress)


def _dry_run(
    opened: Opened, options: RunOptions, about: Mapping[str, Any], on_progress: OnProgress
) -> tuple[Records, dict[str, Any]]:
    with opened.pipeline(options.workers, hashing=False) as (pipeline, _), TemporaryDirectory() as folder:
        walks = partial(walker, pipeline, on_progress=on_progress)
        setting = with_thresholds(opened.setting, opened.plan, walks("thresholds"))
        setting = calibrated(setting, Calibrating(opened, Path(folder), about, walks("calibration"), on_progress))
        return dry_run(opened.plan, setting, walks("merge")), about_calibration(opened, setting, about)


def _finished(out: Path, manifest: Mapping[str, Any], options: RunOptions, on_progress: OnProgress) -> MergeReport:
    """The report of an output that is there and, where it is to be uploaded, was verified."""
    report = MergeReport(out, manifest)
    written = _fields("finished", out=out, bytes=report.bytes_written, seconds=manifest["seconds"])
    log.info("%s is complete: %d tensors", out, len(report.tensors), extra=written)
    if options.report:
        write_report(out, on_progress=on_progress)
    if options.push is None:
        return report
    address = upload(out, [*manifest["outputs"], MANIFEST], options.push, options.quiet)
    log.info("uploaded to %s", address, extra=_fields("pushed", address=address))
    return replace(report, pushed=address)


def _with_surprises(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """The warnings, with what is only known when all was read: experts that are the base itself."""
    labels, records = manifest["experts"], records_of(manifest)
    compared = any(energies_of(record, labels) for record in records.values())
    found = [str(advice) for advice in of_frozen(labels, total_energies(labels, records))] if compared else []
    for warning in found:
        log.warning(warning, extra=_fields("warning"))
    return {"warnings": [*manifest["warnings"], *found]}


def _fields(event: str, **fields: Any) -> dict[str, Any]:
    """What a logged event is, and its figures, for handlers that want more than words."""
    return {"event": event, "fields": fields}


def _logged(on_progress: OnProgress) -> OnProgress:
    """The same, and every step is logged, too."""
    if not log.isEnabledFor(logging.DEBUG):
        return on_progress

    def told(now: Progress) -> None:
        message = "%s: %d of %d %s, %s", now.stage, now.done, now.total, now.unit, now.name
        log.debug(*message, extra=_fields("progress", **asdict(now)))
        on_progress(now)

    return told


def _write(
    opened: Opened, output: OutputFolder, done: Done, options: RunOptions, on_progress: OnProgress
) -> dict[str, Any]:
    """Write everything but the manifest, and return that."""
    plan = opened.plan
    origins = [origin_of(m, c.path) for m, c in zip(plan.recipe.models, opened.checkpoints, strict=True)]
    check_heads(plan, opened.experts)
    journal = output.begin(done)
    try:
        with opened.pipeline(options.workers, hashing=True) as (pipeline, readers):
            walks = partial(walker, pipeline, on_progress=on_progress)
            setting = find_thresholds(plan, opened.setting, walks("thresholds"), done, journal)
            calibrating = Calibrating(opened, output.work, done.identity, walks("calibration"), on_progress)
            setting = calibrated(setting, calibrating)
            walk = walks("merge", writes=True)
            records = write_weights(opened.layout, setting, walk, output, done, journal, readers)
            output.kept = True
            write_heads(plan, readers, output)
            if plan.is_adapter:
                output.write_bytes(ADAPTER_CONFIG, adapter_config(plan, opened.roles, opened.base.config))
            else:
                write_assets(plan, opened.base, opened.assets_from, opened.models, output)
            _write_card(opened, records, origins, output)
            hashes = pipeline.of_readers(Reader.hashes)
    finally:
        journal.close()
    output.kept = False  # of inputs that changed under way nothing is of use
    for checkpoint, found in zip(opened.checkpoints, hashes, strict=True):
        check_unchanged(checkpoint, found)
    output.kept = True
    sums = {path: FileSum(h.sha256, h.nbytes) for found in hashes for path, h in found.items()}
    inputs = [
        (origin, {names.get(path, path.name): sums[path] for path in model.weight_files})
        for origin, names, model in zip(opened.origins, map(_names, opened.models), opened.models, strict=True)
    ]
    measured = about_calibration(opened, setting, done.identity)
    return build_manifest(plan, records, inputs, output.written, 0.0) | measured


def _write_card(opened: Opened, records: Records, origins: Sequence[Origin], output: OutputFolder) -> None:
    plan = opened.plan
    shares = layer_shares(plan.experts, records) if len(plan.experts) > 1 else {}
    if shares:
        output.write_bytes(PICTURE, shares_picture(plan.experts, shares).encode())
    output.write_bytes(CARD, model_card(plan, records, origins, bool(shares)).encode(errors="replace"))


def _names(checkpoint: Checkpoint) -> dict[Path, str]:
    """What the folder calls its files: in a Hub cache those are links to files that are named by their hash."""
    root = files.resolve(checkpoint.path)
    if files.kind(root) != "folder":
        return {}
    return {files.resolve(root / name): name for name in with_asset_folders(root, files.list_folder(root))}


def _is_finished(out: Path, about: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether this very run was finished before it was killed."""
    if files.kind(out / MANIFEST) == "nothing":
        return False
    try:
        if load_manifest(out).get("run") == digest(about):
            return True
    except CheckpointError:  # what it holds is damaged
        if not overwrite:
            raise
    if not overwrite and files.kind(out / JOURNAL) == "nothing":
        raise UsageError(out, "holds a finished merge of another run", "choose another folder or add --overwrite")
    return False


def _check_same_run(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = difference(before, now)
    if changed:
        raise UsageError(out, f"cannot go on: {changed}", "undo the change, or start again with --overwrite")


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
