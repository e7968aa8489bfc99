"""Outputs that are not finished yet: what is there may be a part of a model, or of two models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from acemerge.errors import CheckpointError

MANIFEST = "acemerge.json"  # written last
JOURNAL = ".acemerge.journal"
SHARDS = ".acemerge.shards"  # what the parts of a run note until they are finished


def check_finished(path: Path, names: Collection[str]) -> None:
    """CheckpointError where a folder with these names is an output that a run has begun.

    In a store its shards are visible one by one, under their own names and among those of an earlier output.
    """
    if {JOURNAL, SHARDS} & set(names) and MANIFEST not in names:
        cure = "finish it by acemerge merge or convert with --resume, or name another model"
        raise CheckpointError(path, f"is an unfinished output: it has no {MANIFEST}", cure)
