"""A merge in parts: each an ordinary run over the files that are its own, put together when all are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.hashes import Hashed, Read, check_unchanged, files_read, known_sha256, longer
from acemerge.checkpoints.reader import Reader
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.engine.beside import sums_of
from acemerge.engine.execute import (
    Layout,
    OnProgress,
    Records,
    check_heads,
    find_thresholds,
    walker,
)
from acemerge.engine.opening import Opened, identity_of, open_recipe
from acemerge.engine.pipeline import Pipeline
from acemerge.engine.run_options import RunOptions
from acemerge.engine.shared_counts import shared_counts
from acemerge.engine.writing import Target, write_weights
from acemerge.errors import CheckpointError, UsageError, shortages
from acemerge.output.counts import CountNotes, forget_counts
from acemerge.output.identity import difference, digest
from acemerge.output.journal import Done
from acemerge.output.parts import all_parts, check_begun, found_by_others, part_at, put_together
from acemerge.output.protocol import Output
from acemerge.output.writer import PARTIAL, FileSum
from acemerge.planning.parts import Part, spread
from acemerge.recipes.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """What parts have done: tensors' records, the hashes of the files that they wrote, what they read of the inputs,
    and the hashes of those of them that were hashed whole.
    """

    records: Records
    written: Mapping[str, FileSum]
    read: Sequence[Read]
    sums: Mapping[Path, str]
    identity: Mapping[str, Any]


def compute_part(
    opened: Opened, out: Path, about: Mapping[str, Any], options: RunOptions, on_progress: OnProgress
) -> tuple[Found, bool]:
    """Compute the files of the opened part, all that are not done already; and whether they all were."""
    layout, part = opened.layout, opened.part
    assert part is not None
    check_heads(opened.plan, opened.experts)
    with part_at(out, part, layout.files, options.overwrite) as output:
        done = Done(about)
        if options.resume or not options.overwrite:
            done = output.left(layout.files) or done
            changed = difference(done.identity, about)
            if changed:
                cure = "undo the change, or start it again with --overwrite"
                raise UsageError(out, f"cannot go on with part {part}: {changed}", cure)
            check_begun(out, part, about)
            done = _with_thresholds_of_others(out, part, done)
        else:
            forget_counts(out, part)
        was_done = len(done.steps) == len(layout.jobs) and "complete" in done.findings
        journal = output.begin(done)
        try:
            with opened.pipeline(options.workers, hashing=False) as (pipeline, readers):
                walks = partial(walker, pipeline, on_progress=on_progress)
                setting = opened.setting
                if not was_done:
                    count = shared_counts(
                        opened, CountNotes(out, part, digest(about)), walks("thresholds"), on_progress
                    )
                    setting = find_thresholds(opened.plan, setting, count, done, journal, readers)
                for reader in readers:  # from here on they read what is the part's own
                    reader.hashing = True
                walk = walks("merge", writes=True)
                (records,) = write_weights([Target(layout, setting, output, done, journal)], walk, readers)
                journal.have_read({path: longer(journal.read.get(path, {}), found) for path, found in _whole(pipeline)})
            sums = _sums(done) or _own_sums(opened, part, options.hash_files)
            for checkpoint in opened.models:
                check_unchanged(checkpoint, {})
            output.keep()
            journal.found({"complete": True, "sums": {str(path): sha256 for path, sha256 in sums.items()}})
        finally:
            journal.close()
        written = {name: output.written[name] for name, _ in layout.own}
        return Found(records, written, [journal.read], sums, about), was_done


def _whole(pipeline: Pipeline) -> Iterator[tuple[str, Mapping[str, Hashed]]]:
    """What was read of the files, each tensor's hash complete."""
    for found in pipeline.of_readers(Reader.hashes):
        yield from files_read(found).items()


def _with_thresholds_of_others(out: Path, part: Part, done: Done) -> Done:
    """The same with the thresholds, if another part has found them: they are those of the whole model."""
    known = None if "thresholds" in done.findings else found_by_others(out, part, done.identity, "thresholds")
    return done if known is None else replace(done, findings={**done.findings, "thresholds": known})


def compute_alone(recipe: Recipe, out: Path, options: RunOptions, on_progress: OnProgress) -> None:
    """Open everything and compute the part that the options name: all that a process of its own has to do."""
    with shortages():
        opened = open_recipe(recipe, out, options)
        compute_part(opened, out, identity_of(opened, options.device), options, on_progress)


def _own_sums(opened: Opened, part: Part, hash_files: bool) -> dict[Path, str]:
    """Of the inputs' files, those that are this part's to hash whole: each is hashed by one part."""
    if not hash_files:
        return {}
    sizes = {path: prints[0] for model in opened.models for path, prints in model.fingerprints.items()}
    numbers = spread(list(sizes.values()), part.of)
    own = [path for path, number in zip(sizes, numbers, strict=True) if number == part.number]
    return sums_of([path for path in own if known_sha256(path) is None])


def _sums(done: Done) -> dict[Path, str]:
    return {Path(path): sha256 for path, sha256 in done.findings.get("sums", {}).items()}


def gather(opened: Opened, output: Output, about: Mapping[str, Any]) -> Found:
    """What all parts have done, checked, with their files among those that `output` is to publish.

    UsageError where a part is missing, unfinished or of another run; CheckpointError where a file was damaged.
    """
    files.remove(output.path / (MANIFEST + PARTIAL))  # of a finish that was interrupted
    parts, run = all_parts(output.home, about)
    layouts = {part: Layout(opened.plan, opened.max_shard, part) for part in parts}
    found = {part: _of_part(output, layout) for part, layout in layouts.items()}
    thresholds = {part: done.findings.get("thresholds") for part, done in found.items()}
    odd = [part for part in parts if thresholds[part] != thresholds[parts[0]]]
    if odd:
        what = f"part {odd[0]} found other thresholds than part {parts[0]}"
        raise CheckpointError(output.home, what, f"run them again with --overwrite, --shard {odd[0]} first")
    for layout in layouts.values():
        output.written |= {name: found[layout.part].sums[name] for name, _ in layout.own if layout.part}
    masks = [name for layout in layouts.values() for name in layout.masks]
    for name, specs in replace(opened.layout, part=None).masks.items():
        put_together(output, name, specs, [own for own in masks if Path(own).name == Path(name).name])
    records = {step.tensor: step.record for done in found.values() for step in done.steps}
    sums = {path: sha256 for done in found.values() for path, sha256 in _sums(done).items()}
    in_order = {job.name: records[job.name] for job in opened.plan.jobs}
    return Found(in_order, dict(output.written), [done.read for done in found.values()], sums, run)


def _of_part(output: Output, layout: Layout) -> Done:
    """What a part has done, which is all that it has to do, and as it left it."""
    part = layout.part
    assert part is not None
    again = f"run it again with --shard {part}"
    done = output.left_by(part, layout.files)
    if done is not None and done.damaged is not None:
        raise CheckpointError(output.unfinished(done.damaged), f"is not as part {part} left it", again)
    if done is None or len(done.steps) < len(layout.jobs) or "complete" not in done.findings:
        raise UsageError(output.home, f"part {part} is not finished", again)
    for name, total in done.sums.items():
        if files.fingerprint(output.unfinished(name))[0] != total.nbytes:
            raise CheckpointError(output.unfinished(name), f"is longer than part {part} left it", again)
    return done
