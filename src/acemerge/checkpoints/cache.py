"""What takes seconds to find out and is the same each time: small texts in the user's cache, by what they depend on.

Nothing that is merged may hang on it: what is damaged, or cannot be read or written, is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os

from acemerge.checkpoints import files
from acemerge.errors import CheckpointError, ResourceError, WriteError

_LARGEST = 32 << 20  # bytes
_MOST = 200  # texts of one kind, of which all are dropped when there are more


def recall(kind: str, key: str) -> bytes | None:
    """What was kept under this key, which is a hash."""
    path = files.cache_folder(kind) / key
    try:
        kept = files.read_small(path, _LARGEST) if files.kind(path) == "file" else b""
    except (CheckpointError, ResourceError):
        return None
    data = kept[hashlib.sha256().digest_size :]
    return data if kept and kept == _sealed(data) else None


def keep(kind: str, key: str, data: bytes) -> None:
    """For the next time, in this process or another."""
    if len(data) > _LARGEST:
        return
    folder = files.cache_folder(kind)
    path, part = folder / key, folder / f"{key}.{os.getpid()}"
    with contextlib.suppress(WriteError, CheckpointError, ResourceError):
        files.make_folder(folder)
        names = files.list_folder(folder)
        for name in names if len(names) >= _MOST else []:
            files.remove(folder / name)
        descriptor = files.create(part)
        try:
            files.write_all(descriptor, _sealed(data), part)
        finally:
            files.close(descriptor)
        files.rename(part, path)


def _sealed(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data
