"""A merge in parts: each an ordinary run over the files that are its own, put together when all are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.reader import check_unchanged
from acemerge.engine.execute import (
    Layout,
    OnProgress,
    Records,
    check_heads,
    find_thresholds,
    walker,
)
from acemerge.engine.opening import Opened, RunOptions, identity_of, open_recipe
from acemerge.engine.writing import Target, write_weights
from acemerge.errors import CheckpointError, UsageError, shortages
from acemerge.output.folder import MANIFEST, Output
from acemerge.output.identity import difference
from acemerge.output.journal import Done, Journal, read_journal
from acemerge.output.parts import all_parts, check_begun, found_by_others, part_output, put_together
from acemerge.output.writer import PARTIAL, FileSum
from acemerge.planning.parts import Part, spread
from acemerge.recipes.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """What parts have done: tensors' records, the hashes of the files that they wrote, those of the inputs."""

    records: Records
    written: Mapping[str, FileSum]
    inputs: Mapping[Path, FileSum]
    identity: Mapping[str, Any]


def compute_part(
    opened: Opened, out: Path, about: Mapping[str, Any], options: RunOptions, on_progress: OnProgress
) -> tuple[Found, bool]:
    """Compute the files of the opened part, all that are not done already; and whether they all were."""
    layout, part = opened.layout, opened.part
    assert part is not None
    check_heads(opened.plan, opened.experts)
    with part_output(out, part, layout.files, options.overwrite) as output:
        done = Done(about)
        if options.resume or not options.overwrite:
            done = read_journal(out, layout.files, part.folder) or done
            changed = difference(done.identity, about)
            if changed:
                cure = "undo the change, or start it again with --overwrite"
                raise UsageError(out, f"cannot go on with part {part}: {changed}", cure)
        if options.resume or not options.overwrite:
            check_begun(out, part, about)
            done = _with_thresholds_of_others(out, part, done)
        was_done = len(done.steps) == len(layout.jobs) and "inputs" in done.findings
        output.begun = True
        journal = Journal(out / part.folder, done)
        try:
            with opened.pipeline(options.workers, hashing=False) as (pipeline, readers):
                walks = partial(walker, pipeline, on_progress=on_progress)
                setting = opened.setting
                if not was_done:
                    setting = find_thresholds(opened.plan, setting, walks("thresholds"), done, journal, readers)
                walk = walks("merge", writes=True)
                (records,) = write_weights([Target(layout, setting, output, done, journal)], walk, readers)
            inputs = _hashes(opened, part, done)
            for checkpoint in opened.models:
                check_unchanged(checkpoint, {})
            journal.found({"inputs": {str(path): [total.nbytes, total.sha256] for path, total in inputs.items()}})
        finally:
            journal.close()
        written = {name: output.written[name] for name, _ in layout.own}
        return Found(records, written, inputs, about), was_done


def _with_thresholds_of_others(out: Path, part: Part, done: Done) -> Done:
    """The same with the thresholds, if another part has found them: they are those of the whole model."""
    known = None if "thresholds" in done.findings else found_by_others(out, part, done.identity, "thresholds")
    return done if known is None else replace(done, findings={**done.findings, "thresholds": known})


def compute_alone(recipe: Recipe, out: Path, options: RunOptions, on_progress: OnProgress) -> None:
    """Open everything and compute the part that the options name: all that a process of its own has to do."""
    with shortages():
        opened = open_recipe(recipe, out, options)
        compute_part(opened, out, identity_of(opened, options.device), options, on_progress)


def _hashes(opened: Opened, part: Part, done: Done) -> dict[Path, FileSum]:
    """Of the inputs' files, those that are this part's to hash: each is hashed by one part."""
    if "inputs" in done.findings:
        return _sums(done)
    sizes = {path: prints[0] for model in opened.models for path, prints in model.fingerprints.items()}
    numbers = spread(list(sizes.values()), part.of)
    own = [path for path, number in zip(sizes, numbers, strict=True) if number == part.number]
    return {path: FileSum(files.sha256(path), sizes[path]) for path in own}


def _sums(done: Done) -> dict[Path, FileSum]:
    return {Path(path): FileSum(sha256, nbytes) for path, (nbytes, sha256) in done.findings["inputs"].items()}


def gather(opened: Opened, output: Output, about: Mapping[str, Any]) -> Found:
    """What all parts have done, checked, with their files among those that `output` is to publish.

    UsageError where a part is missing, unfinished or of another run; CheckpointError where a file was damaged.
    """
    files.remove(output.path / (MANIFEST + PARTIAL))  # of a finish that was interrupted
    parts, run = all_parts(output.path, about)
    layouts = {part: Layout(opened.plan, opened.max_shard, part) for part in parts}
    found = {part: _of_part(output.path, layout) for part, layout in layouts.items()}
    thresholds = {part: done.findings.get("thresholds") for part, done in found.items()}
    odd = [part for part in parts if thresholds[part] != thresholds[parts[0]]]
    if odd:
        what = f"part {odd[0]} found other thresholds than part {parts[0]}"
        raise CheckpointError(output.path, what, f"run them again with --overwrite, --shard {odd[0]} first")
    for layout in layouts.values():
        output.written |= {name: found[layout.part].begun[name].sum for name, _ in layout.own if layout.part}
    masks = [name for layout in layouts.values() for name in layout.masks]
    for name, specs in replace(opened.layout, part=None).masks.items():
        put_together(output, name, specs, [own for own in masks if Path(own).name == Path(name).name])
    records = {step.tensor: step.record for done in found.values() for step in done.steps}
    inputs = {path: total for done in found.values() for path, total in _sums(done).items()}
    in_order = {job.name: records[job.name] for job in opened.plan.jobs}
    return Found(in_order, dict(output.written), inputs, run)


def _of_part(out: Path, layout: Layout) -> Done:
    """What a part has done, which is all that it has to do, and as it left it."""
    part = layout.part
    assert part is not None
    again = f"run it again with --shard {part}"
    done = read_journal(out, layout.files, part.folder)
    if done is not None and done.damaged is not None:
        raise CheckpointError(out / (done.damaged + PARTIAL), f"is not as part {part} left it", again)
    if done is None or len(done.steps) < len(layout.jobs) or "inputs" not in done.findings:
        raise UsageError(out, f"part {part} is not finished", again)
    for name, begun in done.begun.items():
        if files.fingerprint(out / (name + PARTIAL))[0] != begun.nbytes:
            raise CheckpointError(out / (name + PARTIAL), f"is longer than part {part} left it", again)
    return done
