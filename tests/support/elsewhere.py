"""acemerge's command as on Windows, as far as Linux can show it: without what only POSIX has, and where an open file is
neither removed nor renamed. `python elsewhere.py COMMANDS` imports every module, then runs each command: COMMANDS is a
list of lists of words, in JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import sys
from typing import Any

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
OF_OS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fork", "getpgid", "getuid", "geteuid", "killpg",
    "mkfifo", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "readv", "sched_getaffinity",
    "statvfs", "sysconf", "sync", "uname", "writev",
)  # fmt: skip
LIBRARIES = ("torch", "safetensors.torch", "numpy", "pydantic", "yaml", "rich.progress", "filelock", "typer", "gradio")
OF_SIGNAL = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "alarm", "pause", "setitimer", "sigwait")


def forget_posix() -> None:
    """From here on. What libraries of others import is theirs: they are there already."""
    for name in LIBRARIES:
        importlib.import_module(name)
    from filelock import lock_descriptor  # noqa: F401  its own lock of this system

    free = shutil.disk_usage(".")
    shutil.disk_usage = lambda _: free  # type: ignore[assignment]
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if name in dir(module):
                delattr(module, name)
    for name in ("unlink", "replace", "rename"):
        setattr(os, name, _only_closed(getattr(os, name)))


def _only_closed(call: Any) -> Any:
    def checked(path: Any, *more: Any, **options: Any) -> Any:
        for name in (path, *more):
            opened = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
            if any(os.path.exists(name) and os.path.exists(fd) and os.path.samefile(fd, name) for fd in opened):
                raise PermissionError(13, "another process is using the file", os.fspath(name))
        return call(path, *more, **options)

    return checked


def main() -> None:
    forget_posix()
    import acemerge

    for module in pkgutil.walk_packages(acemerge.__path__, "acemerge."):
        if module.name != "acemerge.integrations.mergekit":  # for whoever has mergekit
            importlib.import_module(module.name)
    from acemerge.cli.app import main as run

    for words in json.loads(sys.argv[1]):
        with contextlib.suppress(SystemExit):
            run(words)


if __name__ == "__main__":
    main()
