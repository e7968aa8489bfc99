"""A connection to a Ray cluster, or a cluster of this machine alone: the only module that imports ray."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NoReturn

import torch

from acemerge.errors import UsageError

_STORE = 80 << 20  # the least that Ray's object store takes: nothing of ours goes there
_REACHED = 10.0  # seconds to reach a cluster's head


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """ray, connected to a cluster. A connection that the program has already is used and left."""
    with _settings(address) as settings:
        try:
            import ray
        except ImportError:
            raise UsageError(f"--ray {address}", "ray is not installed", "pip install 'acemerge[ray]'") from None
        if ray.is_initialized():
            yield ray
            return
        with contextlib.redirect_stdout(_WithoutRay(sys.stdout)), _interrupted_by_sigterm() as again:
            try:
                _begin(ray, address, settings)
                again()
                yield ray
            finally:
                ray.shutdown()


def _begin(ray: Any, address: str, settings: Mapping[str, Any]) -> None:
    cure = "begin one by `ray start --head` and `ray start --address=HEAD:6379`, or use local"
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACHED).close()
        except (OSError, OverflowError) as failure:
            raise UsageError(f"--ray {address}", f"no cluster is there: {failure}", cure) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as failure:
        raise UsageError(f"--ray {address}", f"no cluster could be joined: {last_line(failure)}", cure) from None


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM interrupts, and reaches its own handler afterwards: what that raises within Ray would be lost there.

    Ray takes both signals for itself when it begins: what this yields takes them back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    def take() -> None:
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        signal.signal(signal.SIGTERM, interrupt)

    take()
    try:
        yield take
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _settings(address: str) -> Iterator[dict[str, Any]]:
    """How to begin a cluster of this machine alone: it leaves nothing behind and serves nobody else."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address != "local":
        yield {}
        return
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:  # it reads these when it is loaded
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_worker_niceness", "0")  # as any other merge here: Ray's own is the least
    folder = tempfile.mkdtemp(prefix="acemerge-ray-")
    try:
        cpus = max(os.cpu_count() or 1, torch.get_num_threads())
        yield {"num_cpus": cpus, "object_store_memory": _STORE, "include_dashboard": False, "_temp_dir": folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _WithoutRay(io.TextIOBase):
    """A stream without what Ray's own thread prints there, of every process that it lost."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        said_by_ray = threading.current_thread().name == "ray_listen_error_messages"
        return len(text) if said_by_ray else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def last_line(failure: Exception) -> str:
    """The last line of what Ray says: the cause."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return (lines[-1].rstrip(".") if lines else type(failure).__name__)[:300]
