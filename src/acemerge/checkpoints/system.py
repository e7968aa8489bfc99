"""What not every system has: flags of open, locks that several hold, limits of a process."""

from __future__ import annotations

import os
from typing import Any

import filelock

fcntl: Any
resource: Any
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import resource
except ImportError:
    resource = None


def flags(*names: str) -> int:
    """Those flags of open that the system has. Windows alone has O_BINARY, without which it changes line ends."""
    found = getattr(os, "O_BINARY", 0)
    for name in names:
        found |= getattr(os, name, 0)
    return int(found)


READ = flags("O_RDONLY", "O_CLOEXEC", "O_NONBLOCK")
WRITE = flags("O_WRONLY", "O_NOFOLLOW", "O_CLOEXEC")
CREATE = WRITE | flags("O_CREAT", "O_EXCL")
LOCK = flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_CLOEXEC")
# A folder can be opened, and so synced.
OPENS_FOLDERS: bool = "O_DIRECTORY" in vars(os)
HAS_FLOCK: bool = fcntl is not None
READS_AT_OFFSET: bool = "preadv" in vars(os)
HAS_STATVFS: bool = "statvfs" in vars(os)


def take_flock(descriptor: int, shared: bool) -> None:
    """BlockingIOError where another holds it."""
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def portable_lock(path: os.PathLike[str]) -> filelock.BaseFileLock:
    """A lock that one alone holds, on any system. Taking it raises `filelock.Timeout` where another holds it."""
    return filelock.FileLock(path, timeout=0, thread_local=False)


def limit(name: str) -> int | None:
    """A limit of the process, as `RLIMIT_AS`; None where there is none, or the system does not say."""
    if resource is None:
        return None
    found: int = resource.getrlimit(getattr(resource, name))[0]
    return None if found == resource.RLIM_INFINITY else found
