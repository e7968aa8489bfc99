"""What git has in the place of a large file, where that was not fetched."""

from __future__ import annotations

from pathlib import Path

from acemerge.errors import CheckpointError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
LENGTH = len(_BEGINNING)


def check_fetched(beginning: bytes, path: Path) -> None:
    """CheckpointError where a file begins as a pointer of Git LFS does: cloning it again gives the same."""
    if beginning.startswith(_BEGINNING):
        cure = "run git lfs pull in its repository, or fetch the model with hf download"
        raise CheckpointError(path, "is a pointer of Git LFS, and the file itself was not fetched", cure)
