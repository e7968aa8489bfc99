"""The server of the page: on this machine's own address, behind the guard, until it is interrupted."""

from __future__ import annotations

import os
import socket
from importlib.resources import files as resources
from typing import Any

from acemerge.checkpoints import files
from acemerge.errors import AcemergeError, UsageError
from acemerge.ui.folders import Folders
from acemerge.ui.runner import Runner
from acemerge.ui.steps import Merged

_PORT = 7860  # if it is free
_LARGEST_REPORT = 64 << 20


class Server:
    """Listens from the beginning, answers from `run` on. UsageError without the extra, or where it cannot listen."""

    def __init__(self, folders: Folders, host: str = "127.0.0.1", port: int | None = None) -> None:
        uvicorn = _libraries()
        from acemerge.ui.guard import Guard  # which is starlette's: there if these are

        self.runner = Runner()
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        guard = Guard(_application(folders, self.runner), host, self.port)
        anywhere = host in ("0.0.0.0", "::")
        name = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
        self.origin = f"http://{name}:{self.port}"
        self.address = f"{self.origin}/?token={guard.token}"
        config = uvicorn.Config(guard, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none")
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Answer until `stop`, or an interrupt; work that runs then is stopped, and nothing unfinished is left."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self.runner.stop()
            self.runner.wait()

    def stop(self) -> None:
        """From another thread."""
        self._server.should_exit = True


def _listen(host: str, port: int | None) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        try:
            return socket.create_server((host, _PORT if port is None else port), family=family)
        except OSError:
            if port is not None:
                raise
            return socket.create_server((host, 0), family=family)
    except (OSError, OverflowError) as failure:
        where = host if port is None else f"{host}:{port}"
        reason = (getattr(failure, "strerror", None) or str(failure)).lower()
        raise UsageError(where, f"cannot listen there: {reason}", "choose another --host or --port") from None


def _libraries() -> Any:
    """uvicorn, with gradio imported so that it asks no network for anything."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as missing:
        what = f"the page needs {missing.name}, which is not installed"
        raise UsageError("ui", what, "pip install 'acemerge[ui]'") from None
    return uvicorn


def _application(folders: Folders, runner: Runner) -> Any:
    """The page at `/`, and the reports of finished merges beside it."""
    import gradio as gr
    from fastapi import FastAPI, Response

    from acemerge.ui.page import build

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def report(number: int) -> Any:
        done = runner.results.get(number)
        if not isinstance(done, Merged) or done.page is None:
            return Response("acemerge: there is no such report\n", 404, media_type="text/plain")
        try:
            page = files.read_small(folders.inside(str(done.page)), _LARGEST_REPORT)
        except AcemergeError as failure:
            return Response(f"acemerge: {failure}\n", 404, media_type="text/plain")
        return Response(page, media_type="text/html")

    app.get("/report/{number}", response_model=None)(report)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.mount_gradio_app(
        app,
        build(folders, runner),
        path="/",
        theme=gr.themes.Base(**fonts),
        css=(resources("acemerge.ui") / "page.css").read_text("utf-8"),
        footer_links=[],
        run_history=False,
    )
