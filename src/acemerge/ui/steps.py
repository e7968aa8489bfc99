"""What the page's buttons do, as work for the runner: look, plan, merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acemerge.api import run_opened
from acemerge.engine.execute import OnProgress
from acemerge.engine.opening import Opened, open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import UsageError
from acemerge.inspection.survey import Inspection, survey
from acemerge.output.merge_report import MergeReport
from acemerge.planning.jobs import Plan
from acemerge.report.write import write_report
from acemerge.ui.choice import Choice
from acemerge.ui.folders import Folders
from acemerge.ui.runner import Stopped

_OPTIONS = RunOptions(quiet=True)


@dataclass(frozen=True)
class Merged:
    """A finished merge. `page` is its report, None where it was stopped while that was written."""

    name: str
    report: MergeReport
    page: Path | None


def open_choice(choice: Choice, folders: Folders, out: Path | None = None, options: RunOptions = _OPTIONS) -> Opened:
    """Opened and planned from headers; UsageError where a file of weights lies outside the folders."""
    opened = open_recipe(choice.recipe(folders), out, options)
    for path in (path for model in opened.models for path in model.weight_files):
        folders.inside(str(path))
    return opened


def inspect(choice: Choice, folders: Folders) -> Callable[[OnProgress], Inspection]:
    """A look at the experts, whatever the rule."""
    return lambda on_progress: survey(open_choice(choice, folders), 1, on_progress)


def plan(choice: Choice, folders: Folders) -> Callable[[OnProgress], Plan]:
    """What gets which rule, from headers alone."""
    return lambda _: open_choice(choice, folders).plan


def merge(choice: Choice, folders: Folders, out: str, overwrite: bool, force: bool) -> Callable[[OnProgress], Merged]:
    """A merge into the folder `out`, with its report. What is wrong with the choice is said at once."""
    if not out.strip():
        raise UsageError("output folder", "is missing", f"write for example {folders.name(folders.roots[0])}/merged")
    target = folders.inside(out)
    choice.recipe(folders)
    options = RunOptions(quiet=True, overwrite=overwrite, force=force)

    def work(on_progress: OnProgress) -> Merged:
        opened = open_choice(choice, folders, target, options)
        report = run_opened(opened, target, options, on_progress)
        try:
            page = write_report(target, None, on_progress)
        except Stopped:
            page = None
        return Merged(folders.name(target), report, page)

    return work
