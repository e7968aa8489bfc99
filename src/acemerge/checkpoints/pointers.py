"""What git has in the place of a large file, where that was not fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError, Cure

_BEGINNING = b"version https://git-lfs.github.com/spec/"
LENGTH = len(_BEGINNING)
_MOST = 1024  # bytes of a pointer


def check_fetched(beginning: bytes, path: Path) -> None:
    """CheckpointError where a file begins as a pointer of Git LFS does: cloning it again gives the same."""
    if beginning.startswith(_BEGINNING):
        pull = "run git lfs pull in its repository"
        fetched = f"{pull}, or fetch the model with hf download"
        cure = Cure(fetched, fetched, f"{pull}, and upload the file itself")
        raise CheckpointError(path, "is a pointer of Git LFS, and the file itself was not fetched", cure)


def check_all_fetched(folder: Path, names: Iterable[str]) -> None:
    """The same of files in a folder that are copied unread, as a tokenizer is. Nothing is asked of a store, where git
    is not.
    """
    if scheme_of(folder):
        return
    root = files.resolve(folder)
    for name in names:
        path = contained(root, name)
        if files.fingerprint(path)[0] <= _MOST:
            check_fetched(files.read_small(path, _MOST)[:LENGTH], folder / name)
