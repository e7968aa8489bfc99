"""Where an output goes: a folder of this machine, or a store."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from acemerge.checkpoints.address import scheme_of
from acemerge.output.folder import output_folder
from acemerge.output.protocol import Output
from acemerge.output.store import store_output


def output_at(
    path: Path, overwrite: bool, resume: bool = False, in_parts: bool = False
) -> AbstractContextManager[Output]:
    """Hold a folder, or an address, for one run; see there."""
    if scheme_of(path):
        return store_output(path, overwrite, resume, in_parts)
    return output_folder(path, overwrite, resume, in_parts)
