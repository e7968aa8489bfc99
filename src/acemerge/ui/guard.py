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
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static)/[\w./-]+|/report/\d+"
    r"|/gradio_api/(info|startup-events|run/predict|heartbeat/\w+)"
)
_OPEN = ("/manifest.json", "/favicon.ico")  # asked for without cookies; they say nothing
_SAME = "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
_SAME += "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
_SAME += "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
# A report is a file that somebody may have put there: it may draw, and reach nothing, this page included.
_ALONE = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
_ALONE += "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ALWAYS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class Guard:
    """An ASGI application before another."""

    def __init__(self, app: App, host: str, port: int) -> None:
        self._app, self._names = app, {"localhost", host.lower(), socket.gethostname().lower()}
        self.token, self._cookie = secrets.token_urlsafe(24), f"acemerge-{port}"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._answer(Request(scope))
            if answer is None:
                await self._app(scope, receive, _with_policy(send, scope["path"]))
            else:
                await answer(scope, receive, send)
        else:  # the page opens no other connections
            await send({"type": "websocket.close", "code": 1008})

    def _answer(self, request: Request) -> Response | None:
        """What is said in the place of the page: why not, or where the link leads."""
        refusal = self._refusal(request)
        if refusal:
            return PlainTextResponse(f"acemerge: {refusal}\n", 403, headers=_ALWAYS)
        if not request.query_params.get("token"):
            return None
        answer = RedirectResponse("/", 303, headers=_ALWAYS)
        answer.set_cookie(self._cookie, self.token, httponly=True, samesite="strict")
        return answer

    def _refusal(self, request: Request) -> str:
        """Why a request is refused, if it is."""
        path, host, origin = request.scope["path"], request.headers.get("host", ""), request.headers.get("origin")
        token = request.query_params.get("token") or request.cookies.get(self._cookie, "")
        if not self._is_ours(host):
            return f"{host[:80]!r} is not a name of this machine; use the address that acemerge ui printed"
        if origin is not None and _host_of(origin) != host:
            return "the request comes from another page; use the one that acemerge ui printed"
        if path not in _OPEN and not secrets.compare_digest(token.encode(), self.token.encode()):
            return "the link is not of this run; use the one that acemerge ui printed"
        if not _PATHS.fullmatch(path) or ".." in path:
            return "nothing is served there; go back to the page"
        return ""

    def _is_ours(self, host: str) -> bool:
        """A name is only ever one of ours; a number cannot be pointed elsewhere.

        Starlette's own list of hosts takes names alone, and where the page listens on every address any may be asked.
        """
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        try:
            ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._names
        return True


def _with_policy(send: Send, path: str) -> Send:
    policy = {"content-security-policy": _ALONE if path.startswith("/report/") else _SAME}
    added = [(name.encode(), value.encode()) for name, value in (policy | _ALWAYS).items()]

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_on


def _host_of(origin: str) -> str | None:
    """Host and port of an address; None of what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # as `http://[`
        return None
