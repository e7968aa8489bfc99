"""Writes the report of a finished merge."""

from __future__ import annotations

from pathlib import Path

from acemerge.checkpoints import files, named
from acemerge.engine.execute import OnProgress
from acemerge.errors import CheckpointError, UsageError
from acemerge.inspection.look_back import try_to_look_back
from acemerge.output.manifest import load_manifest
from acemerge.output.names import REPORT
from acemerge.output.writer import write_file
from acemerge.report.facts import page_facts
from acemerge.report.html import check_libraries, html_page
from acemerge.report.scores import find_scores


def write_report(
    out: str | Path,
    target: str | Path | None = None,
    on_progress: OnProgress = lambda _: None,
    scores: str | Path | None = None,
) -> Path:
    """Write the page to `target`, `OUT/report.html` by default, and return its path.

    `scores` is the `evaluation.json` of an evaluation; without it one that lies in OUT is shown, if there is any.

    The models that were merged are read once more, where they are still there, for cosines, conflict and spectra;
    where they are not the page says so. Raises UsageError without the extra `report`, CheckpointError for a folder
    that is not finished, WriteError.
    """
    check_libraries()
    out = named.location(out)
    if files.kind(files.resolve(out)) != "folder":
        raise CheckpointError(out, "no such folder", "name a folder that acemerge wrote")
    manifest = load_manifest(out)
    if not (manifest["experts"] and manifest.get("inputs") and isinstance(manifest["recipe"].get("method"), dict)):
        raise UsageError(out, "is no merge", "name the output folder of a merge")
    found = find_scores(out, None if scores is None else Path(scores))
    seen, why_not = try_to_look_back(out, manifest, on_progress)
    # A folder's name may hold half a character, which no page may.
    page = html_page(page_facts(manifest, seen, why_not, found)).encode(errors="backslashreplace")
    path = out / REPORT if target is None else Path(target)
    write_file(path, page)
    return path
