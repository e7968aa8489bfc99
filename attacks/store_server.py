"""An S3 API on this machine, and before it a proxy that answers chosen requests as a store does on a bad day."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What becomes of a request: its number, method and path are known; None lets it pass.
Choose = Callable[[int, str, str], "str | None"]
_XML = "<?xml version='1.0'?><Error><Code>{}</Code><Message>for AKIAEXAMPLE</Message></Error>"
_ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}
FAULTS = (*_ANSWERS, "reset", "truncated", "drip", "lost answer")


class Proxy:
    """Between a client and the server at `port`; `choose` says what happens to each request."""

    def __init__(self, port: int) -> None:
        self.choose: Choose = lambda number, method, path: None
        self.asked: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy, Handler.port = proxy, port
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fault_of(self, method: str, path: str) -> str | None:
        with self._lock:
            self.asked.append(f"{method} {path}")
            number = len(self.asked) - 1
        return self.choose(number, method, path)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    port: int
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_of(self.command, urllib.parse.unquote(self.path))
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            self._answer(status, {}, _XML.format(code).encode())
        elif fault == "reset":
            self._reset()
        else:
            status, headers, content = self._passed_on(body)
            if fault == "lost answer":
                self._reset()
            else:
                self._answer(status, headers, content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815  as the base class calls them

    def _passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                server.putheader(key, value)
            server.endheaders(body)
            answer = server.getresponse()
            skipped = ("transfer-encoding", "connection", "date", "server")
            return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in skipped}, answer.read()
        finally:
            server.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, fault: str | None = None) -> None:
        length = headers.get("Content-Length", str(len(content)))
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() != "content-length":
                self.send_header(key, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated" and content:
            self.wfile.write(content[: len(content) // 2])
            self._reset()
        elif fault == "drip":
            for i in range(min(len(content), 20)):
                self.wfile.write(content[i : i + 1])
                self.wfile.flush()
                time.sleep(0.001)
            self.wfile.write(content[20:])
        else:
            self.wfile.write(content)

    def _reset(self) -> None:
        """The connection is gone at once, as by a router."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # what was reset is not written to any more
            self.close_connection = True


@contextmanager
def s3_behind_a_proxy(part_size: int) -> Iterator[tuple[Proxy, Any]]:
    """A proxy with an S3 API behind it, named in the environment, and boto3's client of that API itself.

    Uploads in parts begin at `part_size`, and nobody waits long before a request is repeated.
    """
    import boto3
    import moto.s3.models
    from moto.server import ThreadedMotoServer

    from acemerge.checkpoints import objects, store, store_objects

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto.s3.models.s3_backends.reset()  # what an earlier server of this process kept
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(port)
    access = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    named = {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    named |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    kept = {name: os.environ.get(name) for name in named}
    smallest, part, wait = moto.s3.models.S3_UPLOAD_PART_MIN_SIZE, store_objects.PART, store._FIRST_WAIT
    moto.s3.models.S3_UPLOAD_PART_MIN_SIZE, store_objects.PART, store._FIRST_WAIT = 1, part_size, 0.001
    retries, soon = store_objects._RETRIES, timedelta(milliseconds=1)
    store_objects._RETRIES = retries | {"backoff": {"init_backoff": soon, "max_backoff": 10 * soon, "base": 2}}
    os.environ.update(named)
    objects.forget_stores()
    try:
        yield proxy, boto3.client("s3", endpoint_url=f"http://{host}:{port}", **access)
    finally:
        moto.s3.models.S3_UPLOAD_PART_MIN_SIZE, store_objects.PART, store._FIRST_WAIT = smallest, part, wait
        store_objects._RETRIES = retries
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        for name in (name for name, value in kept.items() if value is None):
            del os.environ[name]
        objects.forget_stores()
        proxy.close()
        server.stop()
