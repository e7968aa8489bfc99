"""Any other scheme, by whichever file system fsspec has for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acemerge.checkpoints.store import Listing, Stat, StoreFailure
from acemerge.errors import UsageError

_MARKS = ("ETag", "etag", "md5", "checksum", "mtime", "LastModified", "last_modified", "created", "ino")


def open_by_fsspec(scheme: str, bucket: str) -> FsspecStore:
    """A folder at the root of a file system. UsageError where what this needs is not installed."""
    try:
        import fsspec.core

        return FsspecStore(*fsspec.core.url_to_fs(f"{scheme}://{bucket}"))
    except Exception as failure:  # a package that is not there, or settings that it asks for
        what = f"fsspec has no access to it ({type(failure).__name__})"
        raise UsageError(f"{scheme}://{bucket}", what, f"install and set up what fsspec needs for {scheme}") from None


class FsspecStore:
    """One root of a file system. What tells a replaced object is whatever the file system has of it."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root

    def stat(self, key: str) -> Stat:
        with _failures():
            return _stat(self._system.info(self._path(key)))

    def listing(self, prefix: str) -> Listing:
        with _failures(), contextlib.suppress(FileNotFoundError):
            self._system.invalidate_cache()
            entries = self._system.ls(self._path(prefix), detail=True)
            names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
            found = {name: _stat(entry) for name, entry in names.items() if entry["type"] == "file"}
            return Listing(found, tuple(name for name, entry in names.items() if entry["type"] == "directory"))
        return Listing({}, ())

    def read(self, key: str, start: int, end: int, expected: Stat) -> bytes:
        if self.stat(key) != expected:
            raise StoreFailure("changed", "changed")
        with _failures():
            return bytes(self._system.cat_file(self._path(key), start=start, end=end))

    def put(self, key: str, data: bytes, new: bool = False) -> Stat:
        with _failures():
            if new and self._system.exists(self._path(key)):  # no file system of fsspec has a better way
                raise StoreFailure("exists", "exists")
            self._made(key)
            self._system.pipe_file(self._path(key), data)
        return self.stat(key)

    def upload(self, key: str, file: Path) -> Stat:
        with _failures():
            self._made(key)
            self._system.put_file(str(file), self._path(key))
        return self.stat(key)

    def delete(self, key: str) -> None:
        with _failures(), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(key))

    def _made(self, key: str) -> None:
        self._system.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root


def _stat(entry: Any) -> Stat:
    if entry["type"] != "file":
        raise StoreFailure("missing", "missing")
    marks = [f"{entry[name]}" for name in _MARKS if entry.get(name) is not None]
    return Stat(int(entry["size"]), " ".join(marks))


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except StoreFailure:
        raise
    except FileNotFoundError:
        raise StoreFailure("missing", "missing") from None
    except PermissionError:
        raise StoreFailure("refused", "access is refused") from None
    except Exception as failure:  # of whichever package serves this scheme
        raise StoreFailure("passing", f"the store fails ({type(failure).__name__})") from None
