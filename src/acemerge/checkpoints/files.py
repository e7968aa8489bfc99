"""The operating-system calls that touch files, but for locks (`locks`): what a test replaces to fail the k-th of them.

Readers use pread, never a memory map: a mapped file that shrinks kills the process. What reads here also reads objects
of stores, whose paths are addresses (`address`): the rest of the library does not know which of both it has.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Literal, cast

from acemerge.checkpoints import objects
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.objects import Opened
from acemerge.checkpoints.ranges import Run
from acemerge.errors import CheckpointError, WriteError, shortage_of

_CHUNK = 1 << 22
_MOST_BUFFERS = 1024  # of one preadv, on every system
_FORGOTTEN_AGAIN = 32 << 20
# Not every system has all: Windows neither knows links as others do nor passes files on to what is started, and would
# change the ends of lines.
OWN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_READ = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_seeking = Lock()
# What may help before another folder is chosen, where something cannot be written.
_FIRST: Mapping[int | None, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space or "),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give access to its folder or "),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or ",
    errno.EIO: "check the disk or ",
}
# What tells that a file was written to: its size and times, or an object's size, ETag and version.
Fingerprint = tuple[int, int | str, int | str]
Handle = int | Opened  # of what is open for reading: a file's descriptor, or an object


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError, or a path that is none, into a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as failure:
        cure = "check the path, its permissions and the disk"
        raise shortage_of(failure, path) or CheckpointError(path, reason_of(failure), cure) from failure


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, or a path that is none, into a WriteError that names `path`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as failure:
        code = failure.errno if isinstance(failure, OSError) else None
        cure = f"{_FIRST.get(code, '')}choose another output folder, then run again"
        raise shortage_of(failure, path) or WriteError(path, reason_of(failure), cure) from failure


def reason_of(failure: Exception) -> str:
    return ((failure.strerror if isinstance(failure, OSError) else None) or str(failure)).lower()


# --- looking ----------------------------------------------------------------------------------------------


Kind = Literal["nothing", "file", "folder", "link", "other"]


def kind(path: Path) -> Kind:
    """What is at `path`; a link is not followed."""
    if scheme_of(path):
        return objects.kind(path)
    with reading(path):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "nothing"
    for name, test in (("link", stat.S_ISLNK), ("file", stat.S_ISREG), ("folder", stat.S_ISDIR)):
        if test(mode):
            return cast(Kind, name)
    return "other"


def places(path: Path) -> dict[Path, tuple[int, int]]:
    """Device and inode of a path and of all folders around it, as far as they are there.

    By a bind mount, one folder has two paths: these tell.
    """
    found: dict[Path, tuple[int, int]] = {}
    if scheme_of(path):
        return found
    with reading(path):
        for place in (path, *path.parents):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                state = os.stat(place)
                found[place] = state.st_dev, state.st_ino
    return found


def folders_within(path: Path, most: int = 1000) -> set[tuple[int, int]]:
    """Device and inode of a folder and of those in it, as far as they can be read; links are not followed.

    No more than the first `most`.
    """
    found: set[tuple[int, int]] = set()
    waiting = deque([] if scheme_of(path) else [path])
    while waiting and len(found) < most:
        folder = waiting.popleft()
        with contextlib.suppress(OSError, ValueError):
            state = os.lstat(folder)
            if stat.S_ISDIR(state.st_mode):
                found.add((state.st_dev, state.st_ino))
                waiting.extend(folder / name for name in sorted(os.listdir(folder)))
    return found


def resolve(path: Path) -> Path:
    """The absolute path with every link followed. In a store there are none."""
    if scheme_of(path):
        return path
    with reading(path):
        return path.resolve()


# --- reading -----------------------------------------------------------------------------------------------


def local_copy(path: Path, wanted: Callable[[str], bool]) -> Path:
    """The folder, or a copy of what is wanted of a prefix, for whoever reads folders alone."""
    if not scheme_of(path):
        return path
    return objects.copy_folder(path, cache_folder("stores"), wanted)


def cache_folder(kind: str) -> Path:
    """`~/.cache/acemerge/KIND`, or where XDG_CACHE_HOME says."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "acemerge", kind)


def open_for_reading(path: Path) -> Handle:
    return objects.open_object(path) if scheme_of(path) else _open_file(path)


def _open_file(path: Path) -> int:
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | _READ)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
        except OSError:
            close(descriptor)
            raise
    close(descriptor)
    # A fifo or a device would hang or never end.
    raise CheckpointError(path, "not a regular file", "name a folder of ordinary files")


def close(descriptor: Handle) -> None:
    """Let go of a file. That this fails says nothing of what was read, nor of what was synced before."""
    if isinstance(descriptor, Opened):
        return
    with contextlib.suppress(OSError):
        os.close(descriptor)


def read_runs(descriptor: Handle, runs: Sequence[Run], path: Path) -> None:
    """Fill the buffers of several runs, each from its own offset; of an object those near each other at once."""
    if isinstance(descriptor, Opened):
        descriptor.fill(runs)
        return
    for offset, buffers in runs:
        read_into(descriptor, buffers, offset, path)


def read_into(descriptor: Handle, buffers: Sequence[memoryview], offset: int, path: Path) -> None:
    """Fill `buffers` one after the other from `offset`; a file that ends too early is an error, not a short read."""
    if isinstance(descriptor, Opened):
        descriptor.fill([(offset, buffers)])
        return
    waiting = deque(buffer for buffer in buffers if len(buffer))
    with reading(path):
        while waiting:
            count = _read_at(descriptor, [waiting[i] for i in range(min(len(waiting), _MOST_BUFFERS))], offset)
            if count == 0:
                missing = sum(map(len, waiting))
                what = f"ends at byte {offset:,}, {missing:,} bytes too early"
                raise CheckpointError(path, what, "the file is truncated or changed while it was read: fetch it again")
            offset += count
            while waiting and count >= len(waiting[0]):
                count -= len(waiting.popleft())
            if count:
                waiting[0] = waiting[0][count:]


def _read_at(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """As many bytes as one call reads. macOS and Windows have no preadv."""
    with contextlib.suppress(AttributeError):
        return os.preadv(descriptor, buffers, offset)
    wanted = min(len(buffers[0]), _CHUNK)
    with _seeking:  # the position is the descriptor's, of which threads may share one
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, wanted)
    buffers[0][: len(found)] = found
    return len(found)


def forget(descriptor: Handle, offset: int, nbytes: int) -> None:
    """Tell the system that a range of a file is not needed in its cache again: what was written goes to the disk now.

    A cache that fills up with what is read once costs more than the reading. The system forgets whole blocks of up
    to some MB only, so that the end of one range goes with the next. A system that cannot is left alone.
    """
    if isinstance(descriptor, Opened):
        return
    first = max(0, offset - _FORGOTTEN_AGAIN)
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, first, offset - first + nbytes, os.POSIX_FADV_DONTNEED)


def free_bytes(path: Path) -> int | None:
    """What the disk still takes of a path that need not be there yet; None for a store, which says nothing of it."""
    if scheme_of(path):
        return None
    with reading(path):
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def fingerprint(path: Path) -> Fingerprint:
    """Size, and times of modification and change in nanoseconds: what differs when a file was written to.

    The time of change is the kernel's own: nobody can set it back. An object has its ETag and version instead.
    """
    if scheme_of(path):
        now = objects.stat(path)
        return now.size, now.etag, now.version
    with reading(path):
        state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_small(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes; a larger one is refused unread."""
    if scheme_of(path):
        return objects.read_small(path, limit)
    with reading(path):
        descriptor = _open_file(path)
        try:
            size = os.fstat(descriptor).st_size
            objects.check_size(path, size, limit)
            buffer = bytearray(size)
            read_into(descriptor, [memoryview(buffer)], 0, path)
            return bytes(buffer)
        finally:
            close(descriptor)


def read_chunks(path: Path) -> Iterator[bytes]:
    """A whole file, a piece at a time."""
    if scheme_of(path):
        yield from objects.read_chunks(path)
        return
    with reading(path):
        descriptor = _open_file(path)
        try:
            while block := os.read(descriptor, _CHUNK):
                yield block
        finally:
            close(descriptor)


def sha256(path: Path, nbytes: int | None = None) -> str:
    """Of a file, or of its first bytes."""
    digest, left = hashlib.sha256(), nbytes
    for block in read_chunks(path):
        part = block if left is None else block[:left]
        digest.update(part)
        if left is not None:
            left -= len(part)
            if not left:
                break
    return digest.hexdigest()


def list_folder(path: Path) -> list[str]:
    """The names in a folder, sorted: no result may depend on the order of a directory."""
    if scheme_of(path):
        return objects.names_in(path)
    with reading(path):
        return sorted(os.listdir(path))


# --- writing -----------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Stores have none to make."""
    if scheme_of(path):
        return
    with writing(path):
        os.makedirs(path, exist_ok=True)


def create(path: Path) -> int:
    """A new file, open for writing. Links and existing files are refused."""
    with writing(path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OWN, 0o644)


def reopen(path: Path, nbytes: int) -> int:
    """A file that was begun, cut to its first `nbytes`, open for writing behind them. Links are refused."""
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | OWN)
        try:
            if os.fstat(descriptor).st_nlink > 1:
                raise OSError(errno.EMLINK, "another file is linked to it")
            os.ftruncate(descriptor, nbytes)
            os.lseek(descriptor, nbytes, os.SEEK_SET)
        except OSError:
            close(descriptor)
            raise
    return descriptor


def write_all(descriptor: int, data: memoryview | bytes, path: Path) -> None:
    view = memoryview(data)
    with writing(path):
        while len(view):
            view = view[os.write(descriptor, view[: 1 << 30]) :]


def sync_and_close(descriptor: int, path: Path) -> None:
    with writing(path):
        try:
            os.fsync(descriptor)
        finally:
            close(descriptor)


def sync_folder(path: Path) -> None:
    """Have the names in a folder survive a loss of power. Windows opens no folder; NTFS has a journal of names."""
    as_folder = getattr(os, "O_DIRECTORY", None)
    if as_folder is None:
        return
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | as_folder | _READ)
        try:
            os.fsync(descriptor)
        finally:
            close(descriptor)


def rename(source: Path, target: Path) -> None:
    with writing(target):
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file or an object; that it is gone already is fine."""
    if scheme_of(path):
        objects.delete(path)
        return
    with writing(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is empty. Stores have none."""
    if scheme_of(path):
        return
    with contextlib.suppress(OSError):
        os.rmdir(path)
