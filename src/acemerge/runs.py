"""What opened plans are, executed: one by itself, or several for the same models in one pass over their files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acemerge.calibration.calibrate import Calibrating, about_calibration, calibrated
from acemerge.checkpoints.hashes import Read, check_unchanged, files_read, tensor_hashes, whole_files
from acemerge.checkpoints.reader import Reader
from acemerge.engine.beside import inputs_of, origins_of, whole_sums, write_beside
from acemerge.engine.execute import OnProgress, Records, check_heads, dry_run, find_thresholds, walker
from acemerge.engine.opening import Opened
from acemerge.engine.run_options import RunOptions
from acemerge.engine.thresholds import counting, with_thresholds
from acemerge.engine.work import Setting, Walk
from acemerge.engine.writing import Target, write_weights
from acemerge.output.identity import digest, with_same_bytes
from acemerge.output.journal import Done, Journal
from acemerge.output.manifest import build_manifest
from acemerge.output.protocol import Output
from acemerge.output.same_run import check_same_run, is_finished


@dataclass(frozen=True)
class Begun:
    """A run whose output is held, and what of it is done."""

    opened: Opened
    output: Output
    done: Done


def begin(opened: Opened, out: Path, output: Output, about: Mapping[str, Any], options: RunOptions) -> Begun | None:
    """None where this very run was finished before."""
    if not options.resume:
        return Begun(opened, output, Done(about))
    if is_finished(out, about, options.overwrite):
        return None
    done = output.left(opened.layout.files) or Done(about)
    models = list(zip(opened.origins, opened.models, strict=True))
    check_same_run(out, with_same_bytes(done.identity, about, models, done.read), about)
    return Begun(opened, output, replace(done, identity=about))


def write(runs: Sequence[Begun], options: RunOptions, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Write everything but the manifests, and return those. The models are the same for all."""
    first = runs[0].opened
    for run in runs:
        check_heads(run.opened.plan, run.opened.experts)
    with contextlib.ExitStack() as stack:
        journals = [stack.enter_context(contextlib.closing(run.output.begin(run.done))) for run in runs]
        with first.pipeline(options.workers, hashing=True) as (pipeline, readers):
            walks = partial(walker, pipeline, on_progress=on_progress)
            settings = [
                _setting(run, journal, walks, readers, on_progress) for run, journal in zip(runs, journals, strict=True)
            ]
            targets = [
                Target(run.opened.layout, setting, run.output, run.done, journal)
                for run, setting, journal in zip(runs, settings, journals, strict=True)
            ]
            found = write_weights(targets, walks("merge", writes=True), readers)
            for run, records in zip(runs, found, strict=True):
                run.output.kept = True
                write_beside(run.opened, records, readers, origins_of(run.opened), run.output)
            hashes = pipeline.of_readers(Reader.hashes)
        sums = whole_sums(first, options.hash_files, {})
    _kept(runs, False)  # of inputs that changed under way nothing is of use
    for checkpoint, read in zip(first.checkpoints, hashes, strict=True):
        check_unchanged(checkpoint, read)
    _kept(runs, True)
    new = [files_read(read) for read in hashes]
    return [
        _manifest(run, target.setting, records, new, sums)
        for run, target, records in zip(runs, targets, found, strict=True)
    ]


def _setting(
    run: Begun, journal: Journal, walks: Callable[[str], Walk], readers: Sequence[Reader], on_progress: OnProgress
) -> Setting:
    """What the rules of a run want to know beforehand, of the whole model and of data."""
    opened = run.opened
    count = counting(opened.setting, walks("thresholds"))
    setting = find_thresholds(opened.plan, opened.setting, count, run.done, journal, readers)
    calibrating = _calibrating(opened, run.output.work, run.done.identity, walks("calibration"), on_progress)
    setting = calibrated(setting, calibrating)
    if opened.calibration:  # networks are loaded by others, which hash nothing
        journal.have_read(whole_files(opened.models[1:]))
    return setting


def _kept(runs: Sequence[Begun], kept: bool) -> None:
    for run in runs:
        run.output.kept = kept


def _manifest(
    run: Begun, setting: Setting, records: Records, new: Sequence[Read], sums: Mapping[Path, str]
) -> dict[str, Any]:
    opened, about = run.opened, run.done.identity
    measured = about_calibration(opened.plan, opened.calibration, setting, about)
    inputs = inputs_of(opened, tensor_hashes([run.done.read, *new]), sums)
    return build_manifest(opened.plan, records, inputs, run.output.written, 0.0) | measured | {"run": digest(about)}


def compute_only(
    opened: Opened, options: RunOptions, about: Mapping[str, Any], on_progress: OnProgress
) -> tuple[Records, dict[str, Any]]:
    """Write nothing: what a run would record of its tensors, and of calibration."""
    with opened.pipeline(options.workers, hashing=False) as (pipeline, _), TemporaryDirectory() as folder:
        walks = partial(walker, pipeline, on_progress=on_progress)
        setting = with_thresholds(opened.setting, opened.plan, counting(opened.setting, walks("thresholds")))
        setting = calibrated(setting, _calibrating(opened, Path(folder), about, walks("calibration"), on_progress))
        measured = about_calibration(opened.plan, opened.calibration, setting, about)
        return dry_run(opened.plan, setting, walks("merge")), measured


def _calibrating(
    opened: Opened, folder: Path, about: Mapping[str, Any], walk: Walk, on_progress: OnProgress
) -> Calibrating:
    return Calibrating(opened.plan, opened.calibration, opened.devices[0], folder, about, walk, on_progress)
