"""A connection to a Ray cluster, or a cluster of this machine alone: the only module that imports ray."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
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
_LEAST = (2, 55)  # the version of ray, as pyproject.toml has it


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """ray, connected to a cluster. A connection that the program has already is used and left."""
    with _settings(address) as settings:
        try:
            import ray
        except ImportError:
            raise UsageError(f"--ray {address}", "ray is not installed", "pip install 'acemerge[ray]'") from None
        if _numbers(ray.__version__) < _LEAST:
            what = f"ray {ray.__version__} is older than {_LEAST[0]}.{_LEAST[1]}"
            raise UsageError(f"--ray {address}", what, "pip install --upgrade 'acemerge[ray]', on every machine")
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
            with socket.create_connection((host.strip("[]"), int(port)), _REACHED) as connection:
                answers = _speaks_grpc(connection)
        except (OSError, OverflowError) as failure:
            raise UsageError(f"--ray {address}", f"no cluster is there: {failure}", cure) from None
        if not answers:  # Ray would try for minutes
            raise UsageError(f"--ray {address}", "what answers there is no cluster's head", cure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as failure:
        if "Version mismatch" in str(failure):
            cure = "install what the cluster has of Ray and Python here, too, or the same everywhere and begin it anew"
            raise UsageError(f"--ray {address}", _versions(str(failure)), cure) from None
        if _wants_token(failure):
            what = "the cluster wants Ray's token, and none or another one was given"
            cure = "set RAY_AUTH_MODE=token, with the head's ~/.ray/auth_token here, too, or RAY_AUTH_TOKEN"
            raise UsageError(f"--ray {address}", what, cure) from None
        raise UsageError(f"--ray {address}", f"no cluster could be joined: {last_line(failure)}", cure) from None


def _wants_token(failure: BaseException | None) -> bool:
    """Whether a failure came of this: with an address, Ray sends no token unless it is told to."""
    while failure is not None:
        if "InvalidAuthToken" in str(failure):
            return True
        failure = failure.__cause__ or failure.__context__
    return False


def head_answers(ray: Any) -> bool:
    """Whether the head of the cluster that ray is connected to can still be reached."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), _REACHED):
        return True
    return False


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether who answers does so as a head does: with settings of HTTP/2. One with TLS says nothing yet."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    with connection.makefile("rb") as answer:
        return answer.read(9)[3:4] == b"\4"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _versions(told: str) -> str:
    """Of what Ray says of the cluster's versions and of this process's, one line."""
    found = re.findall(r"(Ray|Python): (\S+)", told)
    cluster, here = (" and ".join(f"{name} {version}" for name, version in half) for half in (found[:2], found[2:]))
    return f"the cluster has {cluster}, and here is {here}"


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
