"""Who may ask the page's server, and for what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from acemerge.ui.guard import Guard

Ask = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def guard() -> Guard:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    return Guard(app, "127.0.0.1", 7860)


def ask(guard: Guard, path: str, query: str = "", **headers: str) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "127.0.0.1:7860", "cookie": f"a=b; acemerge-7860={guard.token}"} | headers
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": raw}
    asyncio.run(guard(scope, lambda: None, send))  # type: ignore[arg-type,return-value]
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_the_link_leaves_a_cookie_that_no_other_page_may_use(guard: Guard) -> None:
    status, headers = ask(guard, "/", f"token={guard.token}", cookie="")
    assert (status, headers["location"]) == (303, "/")
    value, *about = headers["set-cookie"].split("; ")
    assert value == f"acemerge-7860={guard.token}"
    assert {attribute.lower() for attribute in about} == {"path=/", "httponly", "samesite=strict"}
    assert Guard(guard, "127.0.0.1", 7860).token != guard.token
    for path in (
        "/",
        "/config",
        "/gradio_api/run/predict",
        "/gradio_api/heartbeat/a1",
        "/assets/index-a_b.js",
        "/report/3",
    ):
        assert ask(guard, path)[0] == 200
        assert ask(guard, path, cookie="")[0] == 403
        assert ask(guard, path, cookie=f"acemerge-7861={guard.token}")[0] == 403
        assert ask(guard, path, "token=é", cookie="")[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_another_name_for_this_machine_is_refused(host: str, guard: Guard) -> None:
    assert ask(guard, "/", host=host)[0] == 403
    assert ask(guard, "/", f"token={guard.token}", host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST"])
def test_its_own_names_are_not(host: str, guard: Guard) -> None:
    assert ask(guard, "/", host=host)[0] == 200


def test_another_origin_is_refused(guard: Guard) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8000", "http://localhost:7860", "http://[", "x"):
        assert ask(guard, "/gradio_api/run/predict", origin=origin)[0] == 403
    assert ask(guard, "/gradio_api/run/predict", origin="http://127.0.0.1:7860")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=models/base/config.json",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/upload",
        "/gradio_api/run/show",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/assets/../../secret",
        "/static/..",
        "/report/../config",
        "/monitoring",
        "/login",
        "/config\n",
    ],
)
def test_nothing_else_is_served(path: str, guard: Guard) -> None:
    assert ask(guard, path)[0] == 403


def test_the_browser_is_told_to_load_nothing_from_elsewhere(guard: Guard) -> None:
    policy = ask(guard, "/")[1]["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    report = ask(guard, "/report/1")[1]["content-security-policy"]
    assert report.startswith("sandbox allow-scripts; default-src 'none';")
    assert "allow-same-origin" not in report
    assert "connect-src" not in report


def test_other_connections_are_closed(guard: Guard) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "websocket", "headers": []}, lambda: None, send))  # type: ignore[arg-type,return-value]
    assert [message["type"] for message in sent] == ["websocket.close"]
