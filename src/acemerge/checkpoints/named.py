"""Inputs and outputs as a user names them: paths on this machine, or addresses."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from acemerge.checkpoints.address import is_address, parse, without_user
from acemerge.checkpoints.files import writing
from acemerge.errors import UsageError


def location(text: str | Path) -> Path:
    """Where something is: a path on this machine, or an address, which is checked."""
    return parse(text) or Path(text)


def folder_path(text: str | Path) -> Path:
    """Where an output is to go. UsageError for nothing, which would be the current folder, and for an address."""
    if not str(text).strip():
        raise UsageError("output", "no folder is named", "name one, or . for this one")
    if is_address(text):
        raise UsageError(
            without_user(text), "is an address, and only folders are written to", "name a folder, upload it from there"
        )
    try:
        os.path.abspath(text).encode()
    except UnicodeEncodeError:  # safetensors opens no such file, to see whether it is as it was written
        raise UsageError(text, "lies in a folder whose name is no text in UTF-8", "name another folder") from None
    with writing(Path(text)), contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        os.lstat(text)  # too long a name, or one that no system has
    return Path(text)


def output_path(text: str | Path) -> Path:
    """The same for a model, which may also go to a store, by its address."""
    return parse(text, writing=True) or folder_path(text)
