"""The one path from a recipe to a merged model that the command line and Python share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acemerge.calibration.run import Calibrating, about_calibration, calibrated, data_of
from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.lora import ADAPTER_CONFIG
from acemerge.checkpoints.reader import Reader, check_unchanged
from acemerge.engine.execute import OnProgress, Records, dry_run, find_thresholds, walker, write_heads, write_weights
from acemerge.engine.opening import Opened, RunOptions, open_recipe
from acemerge.engine.thresholds import with_thresholds
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.assets import write_assets
from acemerge.output.card import model_card
from acemerge.output.folder import CARD, MANIFEST, PICTURE, OutputFolder, output_folder
from acemerge.output.identity import difference, digest, identity
from acemerge.output.journal import JOURNAL, Done, read_journal
from acemerge.output.manifest import build_manifest, load_manifest, to_bytes
from acemerge.output.origin import origin_of
from acemerge.output.picture import shares_picture
from acemerge.output.shares import layer_shares
from acemerge.output.upload import upload
from acemerge.output.verify import verify
from acemerge.output.writer import FileSum
from acemerge.planning.as_lora import adapter_config
from acemerge.planning.relatedness import check_related
from acemerge.recipes.recipe import Recipe, make_recipe, with_params
from acemerge.report.html import check_libraries
from acemerge.report.write import write_report


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `manifest` is the table that `acemerge.json` holds; `out` is None for a dry run.

    `pushed` is the address on the Hub where it was uploaded.
    """

    out: Path | None
    manifest: Mapping[str, Any]
    pushed: str | None = None

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """For every tensor: role, rule, reason, status and the rule's own numbers."""
        tensors: Mapping[str, Mapping[str, Any]] = self.manifest["tensors"]
        return tensors


def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    method: str | Mapping[str, Any] = "ace",
    out: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merge checkpoints into the folder `out`; without `out`, compute everything and write nothing.

    Args:
        base: the model that all experts were fine-tuned from, by its folder or its Hub id (`org/name@revision`).
        experts: the same of each expert.
        method: a rule's name, or a table with `name` and its parameters.
        options: fields of the recipe (`scale`, `policy`, `dtype`, ...), of `RunOptions` (`device`, `workers`,
            `overwrite`, `max_shard_size`, `allow_pickle`, `dequantize`, `force`, `quiet`, `push`, `report`), `weights`
            for the experts, and parameters of the rule (`eps=1e-4`).

    Raises AcemergeError: UsageError, CheckpointError, NumericalError or WriteError.
    """
    run_fields = {name: options.pop(name) for name in list(options) if name in RunOptions.__dataclass_fields__}
    if isinstance(experts, str | Path):
        raise UsageError("experts", f"{experts} is one path", "give a list of paths")
    weights = options.pop("weights", None) or [1.0] * len(experts)
    if len(weights) != len(experts):
        raise UsageError("weights", f"{len(weights)} weights for {len(experts)} experts", "give one weight each")
    own = {name: options.pop(name) for name in list(options) if name in Recipe.model_fields}
    if isinstance(own.get("calibration"), Path):
        own["calibration"] = str(own["calibration"])
    spec = with_params(method, options)
    pairs = [{"model": str(path), "weight": weight} for path, weight in zip(experts, weights, strict=True)]
    recipe = make_recipe({"base": str(base), "experts": pairs, "method": spec, **own}, "merge")
    return run_recipe(recipe, None if out is None else Path(out), RunOptions(**run_fields))


def run_recipe(
    recipe: Recipe, out: Path | None, options: RunOptions, on_progress: OnProgress = lambda _: None
) -> MergeReport:
    """Plan and execute a recipe; without `out` compute everything and write nothing."""
    if out is None and options.push is not None:
        raise UsageError("push", "there is no output to upload", "name the output folder with `out`")
    return run_opened(open_recipe(recipe, out, options), out, options, on_progress)


def run_opened(
    opened: Opened, out: Path | None, options: RunOptions, on_progress: OnProgress = lambda _: None
) -> MergeReport:
    """Execute what was opened and planned; with `push`, verify the output and upload it."""
    plan, started = opened.plan, time.perf_counter()
    if options.report:
        check_libraries()
    if not options.force:
        check_related(plan, opened.base, opened.experts)
    about = identity(plan.recipe, opened.models, opened.origins, opened.max_shard, options.device)
    about |= {"calibration": data_of(opened)} if opened.calibration else {}
    if out is None:
        records, measured = _dry_run(opened, options, about, on_progress)
        unread: list[tuple[str, dict[str, FileSum]]] = [(origin, {}) for origin in opened.origins]
        return MergeReport(None, build_manifest(plan, records, unread, {}, _since(started)) | measured)
    with output_folder(out, options.overwrite, options.resume) as output:
        done = Done(about)
        if options.resume:
            if _is_finished(out, about, options.overwrite):
                output.discard()
                return _finished(out, verify(out), options, on_progress)
            done = read_journal(out, opened.layout.files) or done
            _check_same_run(out, done.identity, about)
        manifest = _write(opened, output, done, options, on_progress)
        manifest |= {"seconds": _since(started), "run": digest(about)}
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
    if options.report:
        write_report(out, on_progress=on_progress)
    if options.push is None:
        return MergeReport(out, manifest)
    return MergeReport(out, manifest, upload(out, [*manifest["outputs"], MANIFEST], options.push, options.quiet))


def _write(
    opened: Opened, output: OutputFolder, done: Done, options: RunOptions, on_progress: OnProgress
) -> dict[str, Any]:
    """Write everything but the manifest, and return that."""
    plan = opened.plan
    journal = output.begin(done)
    try:
        with opened.pipeline(options.workers, hashing=True) as (pipeline, readers):
            walks = partial(walker, pipeline, on_progress=on_progress)
            setting = find_thresholds(plan, opened.setting, walks("thresholds"), done, journal)
            calibrating = Calibrating(opened, output.work, done.identity, walks("calibration"), on_progress)
            setting = calibrated(setting, calibrating)
            records = write_weights(opened.layout, setting, walks("merge", writes=True), output, done, journal)
            write_heads(plan, readers, output)
            if plan.is_adapter:
                output.write_bytes(ADAPTER_CONFIG, adapter_config(plan, opened.roles, opened.base.config))
            else:
                write_assets(plan, opened.base, opened.assets_from, opened.models, output)
            _write_card(opened, records, output)
            hashes = pipeline.of_readers(Reader.hashes)
    finally:
        journal.close()
    for checkpoint, found in zip(opened.checkpoints, hashes, strict=True):
        check_unchanged(checkpoint, found)
    sums = {path: FileSum(h.sha256, h.nbytes) for found in hashes for path, h in found.items()}
    inputs = [
        (origin, {names.get(path, path.name): sums[path] for path in model.weight_files})
        for origin, names, model in zip(opened.origins, map(_names, opened.models), opened.models, strict=True)
    ]
    measured = about_calibration(opened, setting, done.identity)
    return build_manifest(plan, records, inputs, output.written, 0.0) | measured


def _write_card(opened: Opened, records: Records, output: OutputFolder) -> None:
    plan = opened.plan
    origins = [origin_of(m, c.path) for m, c in zip(plan.recipe.models, opened.checkpoints, strict=True)]
    shares = layer_shares(plan.experts, records) if len(plan.experts) > 1 else {}
    if shares:
        output.write_bytes(PICTURE, shares_picture(plan.experts, shares).encode())
    output.write_bytes(CARD, model_card(plan, records, origins, bool(shares)).encode())


def _names(checkpoint: Checkpoint) -> dict[Path, str]:
    """What the folder calls its files: in a Hub cache those are links to files that are named by their hash."""
    root = files.resolve(checkpoint.path)
    if files.kind(root) != "folder":
        return {}
    return {files.resolve(root / name): name for name in files.list_folder(root)}


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
