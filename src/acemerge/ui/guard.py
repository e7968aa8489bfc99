"""What stands before the page's server: only its own browser, only its own addresses, nothing from elsewhere.

Gradio looks at no Host header, so that any web page could reach it by a name of its own that it points at this
machine; and it serves much that this page does not use: uploads, files, a proxy. So a request must know the token
of this run, from the link that is printed or the cookie that the link leaves; must name this machine as its host
and no other origin; and must ask for one of a few paths. What comes back tells the browser to load nothing from
elsewhere.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static)/[\w./-]+|/report/\d+"
    r"|/gradio_api/(info|startup-events|cancel|queue/(join|data)|heartbeat/\w+)"
)
_OPEN = ("/manifest.json", "/favicon.ico")  # asked for without cookies; they say nothing
_SAME = "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
_SAME += "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
_SAME += "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
# A report is a file that somebody may have put there: it may draw, and reach nothing, this page included.
_ALONE = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
_ALONE += "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Guard:
    """An ASGI application before another."""

    def __init__(self, app: App, host: str, port: int) -> None:
        self._app, self._names = app, {"localhost", host.lower(), socket.gethostname().lower()}
        self.token, self._cookie = secrets.token_urlsafe(24), f"acemerge-{port}"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # the page opens no other connections
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        refusal = self.refusal(scope["path"], headers, given)
        if refusal:
            await _say(send, 403, f"acemerge: {refusal}\n")
        elif given:
            cookie = f"{self._cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            await _say(send, 303, "", (b"location", b"/"), (b"set-cookie", cookie.encode()))
        else:
            await self._app(scope, receive, _with_policy(send, scope["path"]))

    def refusal(self, path: str, headers: Mapping[str, str], token: str = "") -> str:
        """Why a request is refused, if it is."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return f"{host[:80]!r} is not a name of this machine; use the address that acemerge ui printed"
        if "origin" in headers and _host_of(headers["origin"]) != host:
            return "the request comes from another page; use the one that acemerge ui printed"
        if path not in _OPEN and not _same(token or self._from_cookie(headers.get("cookie", "")), self.token):
            return "the link is not of this run; use the one that acemerge ui printed"
        if not _PATHS.fullmatch(path) or ".." in path:
            return "nothing is served there; go back to the page"
        return ""

    def _is_ours(self, host: str) -> bool:
        """A name is only ever one of ours; a number cannot be pointed elsewhere."""
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        try:
            ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._names
        return True

    def _from_cookie(self, header: str) -> str:
        try:
            found = SimpleCookie(header).get(self._cookie)
        except CookieError:
            return ""
        return "" if found is None else found.value


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _with_policy(send: Send, path: str) -> Send:
    policy = _ALONE if path.startswith("/report/") else _SAME
    added = [(b"content-security-policy", policy.encode()), *_ALWAYS]

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_on


_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


async def _say(send: Send, status: int, text: str, *headers: tuple[bytes, bytes]) -> None:
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *_ALWAYS, *headers]})
    await send({"type": "http.response.body", "body": text.encode()})


def _host_of(origin: str) -> str | None:
    """Host and port of an address; None of what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # as `http://[`
        return None
