"""Objects in stores, as `files` has files: by their paths, which are addresses, and with the library's errors."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from acemerge.checkpoints.address import HUB, OBJECT_STORES, place_of
from acemerge.checkpoints.ranges import Run, fill
from acemerge.checkpoints.store import Listing, Stat, Store, StoreFailure, persistently
from acemerge.checkpoints.store_hub import HubStore
from acemerge.errors import CheckpointError, UnreachableError, WriteError, fetching

_FIRST = 64 << 10  # read with a file's first bytes: most headers end before
_CHUNK = 16 << 20
_TOO_LARGE = fetching("it, or make it, again").because("no file of its kind is so large")
_CUT = fetching("it again").because("it is truncated or was replaced while it was read")
_AGAIN = "check the address, the credentials in the environment and the network, then run again"


@functools.cache
def store_of(scheme: str, bucket: str) -> Store:
    """The bucket, opened once."""
    if scheme in OBJECT_STORES:
        from acemerge.checkpoints.store_objects import open_objects

        return open_objects(scheme, bucket)
    if scheme == HUB:
        return _hub_store(bucket)
    from acemerge.checkpoints.store_fsspec import open_by_fsspec

    return open_by_fsspec(scheme, bucket)


@functools.cache
def _hub_store(bucket: str) -> HubStore:
    from acemerge.checkpoints.hub import library

    repo, _, commit = bucket.partition("@")
    return HubStore(library(), repo, commit)


def forget_stores() -> None:
    """The environment may name others now."""
    store_of.cache_clear()
    _hub_store.cache_clear()


def hub_store(path: Path) -> HubStore:
    """That of a commit, for whoever knows which of its files are wanted."""
    return _hub_store(place_of(path).bucket)


def _located(path: Path) -> tuple[Store, str]:
    place = place_of(path)
    return store_of(place.scheme, place.bucket), place.key


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreFailure as failure:
        if failure.kind == "changed":
            what, cure = "changed during the run", "let nobody write to the inputs and run again"
            raise CheckpointError(path, what, cure) from None
        if failure.kind == "missing":
            raise CheckpointError(path, "no such object", _AGAIN) from None
        raise UnreachableError(path, failure.said, _AGAIN) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a store's failure into a WriteError that names `path`."""
    try:
        yield
    except StoreFailure as failure:
        said = "there is no such bucket" if failure.kind == "missing" else failure.said
        raise WriteError(path, said, _AGAIN) from None


# --- looking ------------------------------------------------------------------------------------------------


def kind(path: Path) -> Literal["nothing", "file", "folder"]:
    """Whether there is an object of this name, or whether it is a prefix of some."""
    if find(path) is not None:
        return "file"
    listing = _listing(path)
    return "folder" if listing.objects or listing.folders else "nothing"


def find(path: Path) -> Stat | None:
    """What an object is now; None where there is none."""
    store, key = _located(path)
    if not key:
        return None
    with _reading(path):
        return persistently(lambda: _stat_or_none(store, key))


def _stat_or_none(store: Store, key: str) -> Stat | None:
    try:
        return store.stat(key)
    except StoreFailure as failure:
        if failure.kind == "missing":
            return None
        raise


def stat(path: Path) -> Stat:
    found = find(path)
    if found is None:
        raise CheckpointError(path, "no such object", _AGAIN)
    return found


def _listing(path: Path) -> Listing:
    store, key = _located(path)
    with _reading(path):
        return persistently(lambda: store.listing(key))


def names_in(path: Path) -> list[str]:
    """What lies directly under a prefix, sorted."""
    found = _listing(path)
    return sorted({*found.objects, *found.folders})


def stats_below(path: Path) -> dict[str, Stat]:
    """All objects below a prefix, by their keys from there. CheckpointError for keys that are no paths."""
    found = _listing(path)
    odd = [name for name in (*found.objects, *found.folders) if name in ("", ".", "..") or "\\" in name]
    if odd:
        cure = "rename that object, or name another address"
        raise CheckpointError(path, f"has the key {odd[0]!r}, which is no path", cure)
    below = {f"{name}/{key}": s for name in found.folders for key, s in stats_below(path / name).items()}
    return {**found.objects, **below}


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """An object that is read by ranges, as it was when it was opened."""

    path: Path
    stat: Stat
    _first: bytes = field(default=b"", repr=False)

    def read(self, start: int, end: int) -> bytes:
        """These bytes, all of them."""
        store, key = _located(self.path)

        def once() -> bytes:
            content = store.read(key, start, end, self.stat)
            if len(content) != end - start:
                raise StoreFailure("passing", f"the store sent {len(content):,} of {end - start:,} bytes")
            return content

        with _reading(self.path):
            return persistently(once)

    def fill(self, runs: Sequence[Run]) -> None:
        """Fill buffers from their offsets; a file that ends too early is an error."""
        end = max((offset + sum(map(len, buffers)) for offset, buffers in runs), default=0)
        if end > self.stat.size:
            what = f"ends at byte {self.stat.size:,}, {end - self.stat.size:,} bytes too early"
            raise CheckpointError(self.path, what, _CUT)
        if end <= _FIRST and end:
            self._first = self._first or self.read(0, min(_FIRST, self.stat.size))
            fill(runs, lambda start, end: self._first[start:end])
        elif end:
            fill(runs, self.read)


def open_object(path: Path) -> Opened:
    return Opened(path, stat(path))


def read_small(path: Path, limit: int) -> bytes:
    opened = open_object(path)
    check_size(path, opened.stat.size, limit)
    return b"".join(_chunks(opened))


def check_size(path: Path, size: int, limit: int) -> None:
    """CheckpointError for a file, or an object, that is larger than its kind may be."""
    if size > limit:
        what = f"{size:,} bytes, more than the {limit:,} that such a file may have"
        raise CheckpointError(path, what, _TOO_LARGE)


def read_chunks(path: Path) -> Iterator[bytes]:
    return _chunks(open_object(path))


def _chunks(opened: Opened) -> Iterator[bytes]:
    for start in range(0, opened.stat.size, _CHUNK):
        block = bytearray(min(_CHUNK, opened.stat.size - start))
        opened.fill([(start, [memoryview(block)])])
        yield bytes(block)


def copy_folder(path: Path, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """What is wanted of a prefix, in a folder of the cache that only its very objects have; fetched if it is not
    there.
    """
    found = {key: s for key, s in stats_below(path).items() if wanted(key)}
    about = repr([str(path), *((key, s.size, s.etag, s.version) for key, s in sorted(found.items()))])
    home = cache / hashlib.sha256(about.encode()).hexdigest()[:32]
    if home.is_dir():
        return home
    with _caching(home):
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix="."))
        try:
            for key in found:
                target = scratch / key
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    file.writelines(read_chunks(path / key))
            _move(scratch, home)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return home


def _move(scratch: Path, home: Path) -> None:
    """Another process may have been first with the same copy."""
    try:
        scratch.rename(home)
    except OSError:
        if not home.is_dir():
            raise


@contextlib.contextmanager
def _caching(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise WriteError(
            home, f"cannot keep a copy ({failure.strerror})", "free space, or set XDG_CACHE_HOME"
        ) from None


# --- writing ------------------------------------------------------------------------------------------------


def put(path: Path, data: bytes, new: bool = False) -> Stat:
    """Write a small object at once. WriteError, and FileExistsError where it must be `new` and is not.

    An answer that was lost may have been a success: what is there then is compared with what was to be written.
    """
    store, key = _located(path)
    with writing(path):
        try:
            return persistently(lambda: store.put(key, data, new))
        except StoreFailure as failure:
            if failure.kind not in ("exists", "changed"):
                raise
            there = persistently(lambda: _stat_or_none(store, key))
            same = there is not None and there.size == len(data)
            if same and there and persistently(lambda: store.read(key, 0, there.size, there)) == data:
                return there
            raise FileExistsError(str(path)) from None


def upload(path: Path, file: Path) -> Stat:
    """Write an object from a file: it is there when all of it is."""
    store, key = _located(path)
    with writing(path):
        return persistently(lambda: store.upload(key, file))


def delete(path: Path) -> None:
    store, key = _located(path)
    with writing(path):
        persistently(lambda: store.delete(key))
