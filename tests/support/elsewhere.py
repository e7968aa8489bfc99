"""Run a command as on a system without what POSIX alone has: python elsewhere.py WORD... ; no words: import all."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
OF_OS = (
    "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK preadv pread pwrite pwritev posix_fadvise posix_fallocate statvfs "
    "fstatvfs sched_getaffinity sched_setaffinity sysconf getuid geteuid getgid fork forkpty register_at_fork uname "
    "mkfifo getpgid setsid killpg nice chown fchmod"
)
OF_SIGNAL = "SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGALRM SIGPIPE SIGCHLD pthread_sigmask setitimer alarm"


def become(*loaded: str) -> None:
    """Take away what is not there, behind libraries that have their own way about it: they are loaded before."""
    for name in loaded:
        importlib.import_module(name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # which an import takes for missing
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names.split():
            vars(module).pop(name, None)


def every_module() -> list[str]:
    """Without the plug-in of mergekit, which is loaded by it alone and needs it."""
    import acemerge

    names = (found.name for found in pkgutil.walk_packages(acemerge.__path__, "acemerge."))
    return [name for name in names if name != "acemerge.integrations.mergekit"]


def main() -> None:
    if sys.argv[1:]:
        become("torch")
        importlib.import_module("acemerge.__main__").main()
        return
    become("torch", "gradio")
    names = every_module()
    for name in names:
        importlib.import_module(name)
    print(len(names))


if __name__ == "__main__":
    main()
