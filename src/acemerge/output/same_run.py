"""Whether what lies in an output is of this very run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.unfinished import JOURNAL, MANIFEST
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.identity import difference, digest
from acemerge.output.manifest import load_manifest


def is_finished(out: Path, about: Mapping[str, Any], overwrite: bool) -> bool:
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


def check_same_run(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = difference(before, now)
    if changed:
        raise UsageError(out, f"cannot go on: {changed}", "undo the change, or start again with --overwrite")
