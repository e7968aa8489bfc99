"""Google Cloud Storage for tests: what obstore asks of it, translated for the S3 API on this machine.

The XML API is that of S3, but for generations in the place of versions and of `If-None-Match`.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stores import KEY, S3

from acemerge.checkpoints import objects

_PASSED_ON = ("content-type", "content-length", "range", "if-match")
# moto looks whether it is there.
_SIGNED = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_ANSWERED = ("etag", "last-modified", "content-range", "content-type")


class _Handler(BaseHTTPRequestHandler):
    s3: str
    generations: Counter[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        path = urllib.parse.quote(urllib.parse.unquote(path))  # obstore escapes all that is no letter nor figure
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if asked.pop("generation", str(self.generations[path])) != str(self.generations[path]):
            self._answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() in _PASSED_ON}
        headers["Authorization"] = _SIGNED
        if self.headers.get("x-goog-if-generation-match") == "0":
            headers["If-None-Match"] = "*"
        server = http.client.HTTPConnection(self.s3, timeout=60)
        server.request(self.command, f"{path}?{urllib.parse.urlencode(asked)}", body, headers)
        answer = server.getresponse()
        if answer.status == 200 and (self.command == "PUT" or "uploadId" in asked) and "partNumber" not in asked:
            self.generations[path] += 1
        found = {name: value for name, value in answer.getheaders() if name.lower() in _ANSWERED}
        self._answer(answer.status, found | {"x-goog-generation": str(self.generations[path])}, answer.read(), answer)
        server.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815  as the base class calls them

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, of: http.client.HTTPResponse | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = of.getheader("Content-Length") if of is not None and self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def google(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The buckets of the S3 server, by gs:// addresses; nothing else is named in the environment."""

    class Handler(_Handler):
        pass

    Handler.s3, Handler.generations = s3.endpoint.removeprefix("http://"), Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    account = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps(account))
    for name in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    objects.forget_stores()
    yield s3
    objects.forget_stores()
    server.shutdown()
    server.server_close()
