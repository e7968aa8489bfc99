"""A server on this machine that speaks the Hub's HTTP calls, as huggingface_hub makes them, and keeps a log."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from builders import PlainModel

TOKEN = "hf_letmein"  # the only token that this Hub knows
_LARGE = 256  # bytes from which a file is stored as a large one


@dataclass
class Repository:
    """Branches that point at commits, and what those hold."""

    gated: bool = False
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        parts = [branch, *sorted(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in files.items())]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]] if self.refs else {}


class FakeHub:
    """Serves `repositories`; `asked` holds what was asked for, as `METHOD path`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.by_range = 0  # bytes of files that were sent in parts
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.large: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}  # a part of a path -> the status that it is answered with
        self.refuse_after: set[str] = set()  # files that are asked for elsewhere before anything is refused
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def fetched(self) -> set[str]:
        """The files that were asked for."""
        return {_file(line) for line in self.asked if "/resolve/" in line}

    def wait_until_asked(self, names: set[str]) -> None:
        """Downloads run side by side, and the first that fails ends those that have not begun."""
        end = time.monotonic() + 60
        while not names <= {_file(line) for line in self.asked if line.startswith("GET ")}:
            assert time.monotonic() < end, f"of {names} not all were asked for"
            time.sleep(0.005)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _file(line: str) -> str:
    """The file that was asked for; empty where it was something else."""
    return line.partition("/resolve/")[2].partition("/")[2]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{method} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = next((status for part, status in self.hub.refuse.items() if part in self.path), 0)
        if status:
            self.hub.wait_until_asked(self.hub.refuse_after)
            self._answer(status, {"error": "refused by the test"})
            return
        writes = method in ("POST", "PUT")
        for pattern, action in _WRITES if writes else _READS:
            found = re.fullmatch(pattern, self.path)
            if found:
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/store/" not in self.path:
                    self._answer(401, {"error": "no token"})
                else:
                    action(self, **found.groupdict())
                return
        self._answer(404, {"error": "no such call"})

    def _answer(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        always = {"Content-Length": str(len(data)), "X-HF-Warning": "test; a warning to whoever reads a terminal"}
        for key, value in {**always, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError):
                self.wfile.write(data)

    def _refused(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _commit(self, repo: str, revision: str, content: bool = False) -> tuple[str, dict[str, bytes]] | None:
        """The commit that is asked for, or None when the refusal was sent."""
        found = self.hub.repositories.get(repo)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not allowed):
            self._refused(404 if allowed else 401, "RepoNotFound")
        elif found.gated and content and not allowed:
            self._refused(401, "GatedRepo")
        elif found.refs.get(revision, revision) not in found.commits and found.refs:
            self._refused(404, "RevisionNotFound")
        else:
            sha = found.refs.get(revision, revision)
            return sha, found.commits.get(sha, {})
        return None

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._commit(repo, revision or "main")
        if found:
            sha, held = found
            siblings = [{"rfilename": name, "size": len(data), **_large(name, data)} for name, data in held.items()]
            self._answer(200, {"id": repo, "sha": sha, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision)
        if found:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in found[1].items()
            ]
            self._answer(200, entries)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._commit(repo, revision, content=True)
        if found is None:
            return
        sha, held = found
        if name not in held:
            self._refused(404, "EntryNotFound")
            return
        large = _large(name, held[name])
        etag = large["lfs"]["sha256"] if large else hashlib.sha1(held[name]).hexdigest()
        about = {"ETag": f'"{etag}"', "X-Repo-Commit": sha}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None:
            self._answer(200, held[name], about)
        else:
            part = held[name][int(asked[1]) : int(asked[2]) + 1]
            self.hub.by_range += len(part)
            self._answer(206, part, about | {"Content-Range": f"bytes {asked[1]}-{asked[2]}/{len(held[name])}"})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        self.hub.created.append(asked)
        if repo in self.hub.repositories:
            self._answer(409, {"error": "there already", "url": f"{self.hub.address}/{repo}"})
            return
        self.hub.repositories[repo] = Repository()
        self._answer(200, {"url": f"{self.hub.address}/{repo}"})

    def validate(self) -> None:
        self._answer(200, {"warnings": [{"message": "no licence is named"}], "errors": []})

    def preupload(self, repo: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > _LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": modes})

    def batch(self, repo: str) -> None:
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.hub.address}/store/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self._answer(200, {})

    def make_commit(self, repo: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        self.hub.commits.append(lines)
        held = dict(self.hub.repositories[repo].head)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del held[value["path"]]
            else:
                large = line["key"] == "lfsFile"
                held[value["path"]] = self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
        sha = self.hub.repositories[repo].commit(held)
        self._answer(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_DATA = r"(?P<repo>datasets/[^/]+/[^/]+)"  # a data set's repository is kept under this name
_READS = (
    (rf"/api/{_DATA}", _Handler.info),
    (rf"/api/{_DATA}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/{_DATA}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    (rf"/{_DATA}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (rf"/api/models/{_REPO}", _Handler.info),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
)
_WRITES = (
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/store/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (rf"/api/models/{_REPO}/commit/main", _Handler.make_commit),
)


# --- what tests put there ----------------------------------------------------------------------------------

JUNK = dict.fromkeys(
    (
        *("README.md", ".gitattributes", "modeling_base.py", "tf_model.h5", "flax_model.msgpack", "model.gguf"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "onnx/model.onnx"),
        *("original/model.safetensors", "consolidated.safetensors", "../../config.json"),
    ),
    b"not wanted",
)
# Files of one content would be fetched once.
ASSETS = {
    name: json.dumps({"about": name}).encode()
    for name in (
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        "additional_chat_templates/rag.jinja",
    )
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(hub: FakeHub, plain: PlainModel) -> list[str]:
    """The model's base and experts as `org/base`, `org/e1`, ...; the command's arguments for them."""
    base, experts = plain.save()
    words = ["--base", "org/base"]
    for folder in (base, *experts):
        hub.repositories[f"org/{folder.name}"] = Repository()
        hub.repositories[f"org/{folder.name}"].commit(contents(folder) | ASSETS | JUNK)
        words += ["--expert", f"org/{folder.name}"] if folder != base else []
    return words


def _large(name: str, data: bytes) -> dict[str, Any]:
    """What the Hub says of a file that it keeps by its SHA-256, as it does of all weights."""
    if not name.endswith((".safetensors", ".bin")):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
