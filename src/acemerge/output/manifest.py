"""`acemerge.json`: what was merged from what, by which rule, and the hash of every file. Written last."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from acemerge.checkpoints import files
from acemerge.checkpoints.header import parse_json
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.errors import CheckpointError
from acemerge.output.names import MAX_MANIFEST
from acemerge.output.records import AGAIN, AGAIN_NOW, TensorRecord, share_lost
from acemerge.output.writer import FileSum
from acemerge.planning.jobs import Plan

FORMAT = "acemerge-manifest-1"


class _File(TypedDict):
    sha256: str
    bytes: int


class _InputFile(TypedDict):
    """A file's own hash is there where it was known or asked for."""

    bytes: int
    sha256: NotRequired[str]
    tensors: NotRequired[dict[str, str]]


class _Input(TypedDict):
    path: str
    files: dict[str, _InputFile]


class _Needed(TypedDict):
    """What readers of a manifest rely on."""

    inputs: NotRequired[list[_Input]]
    versions: NotRequired[dict[str, str]]
    warnings: NotRequired[list[str]]

    stored: NotRequired[dict[str, list[str]]]  # of an adapter
    experts: list[str]
    outputs: dict[str, _File]
    tensors: dict[str, dict[str, Any]]
    heads: dict[str, dict[str, str]]
    recipe: dict[str, Any]


_SHAPE = TypeAdapter(_Needed)


@dataclass(frozen=True)
class InputFile:
    """What the manifest says of a file that was read: the SHA-256 of its tensors, and its own where that is known."""

    nbytes: int
    sha256: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = {} if self.sha256 is None else {"sha256": self.sha256}
        tensors = {"tensors": dict(sorted(self.tensors.items()))} if self.tensors else {}
        return {**own, "bytes": self.nbytes, **tensors}


def build_manifest(
    plan: Plan,
    records: Mapping[str, TensorRecord],
    inputs: Sequence[tuple[str, Mapping[str, InputFile]]],
    outputs: Mapping[str, FileSum],
    seconds: float,
) -> dict[str, Any]:
    """The manifest as a table; `inputs` is (path, files) for the base and then every expert."""
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "inputs": [
            {"path": path, "files": {name: read.to_json() for name, read in sorted(found.items())}}
            for path, found in inputs
        ],
        "outputs": _sums(outputs),
        "experts": list(plan.experts),
        "adapters": {label: str(adapter) for label, adapter in plan.adapters.items()},
        "dequantized": dict(plan.dequantized),
        "roles": plan.roles_source,
        "tensors": {name: record.to_json() for name, record in records.items()},
        **(_of_adapter(plan, records) if plan.is_adapter else {}),
        "heads": {
            label: {head.spec.name: head.reason for head in heads}
            for label, heads in zip(plan.experts, plan.heads, strict=True)
        },
        "warnings": list(plan.warnings),
        "seconds": seconds,
    }


def _of_adapter(plan: Plan, records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    """Of an output that is an adapter: the factors that it holds of each tensor, and the share of energy it lacks."""
    stored = {job.name: [spec.name for spec in job.stored] for job in plan.jobs if job.stored}
    return {"stored": stored, "share_lost": share_lost(records.values())}


def stored_names(manifest: Mapping[str, Any]) -> set[str]:
    """The tensors in the output's weight files."""
    if "stored" not in manifest:
        return set(manifest["tensors"])
    return {name for names in manifest["stored"].values() for name in names}


def _sums(sums: Mapping[str, FileSum]) -> dict[str, dict[str, Any]]:
    return {name: {"sha256": s.sha256, "bytes": s.nbytes} for name, s in sorted(sums.items())}


def versions() -> dict[str, str]:
    try:
        own = version("acemerge")
    except PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {
        "acemerge": own,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": str(safetensors.__version__),
        "platform": platform.platform(),
    }


def to_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, with a digest of all the rest as its last key."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(_spell(content)).hexdigest()
    return _spell({**content, "digest": digest})


def _spell(content: Mapping[str, Any]) -> bytes:
    """One key a line, and one line a tensor, of the inputs, too: for people, and for tools that compare lines."""
    # Python's JSON writes NaN and infinities as words that are no JSON: they become null.
    clean = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return f"{{{_lines(clean, _by_line)}\n}}\n".encode()


def _by_line(key: str, value: Any) -> str:
    if key == "inputs" and isinstance(value, list):
        return f"[{', '.join(map(_input_by_line, value))}]"
    if key not in ("tensors", "outputs", "inputs") or not isinstance(value, dict):
        return json.dumps(value)
    return f"{{{_lines(value, lambda _, entry: json.dumps(entry))}\n}}"


def _input_by_line(model: Any) -> str:
    """A model with its tensors' hashes, each in a line of its own; one without any in a single line."""

    def spell(key: str, value: Any) -> str:
        if isinstance(value, dict) and value and key in ("files", "tensors"):
            return f"{{{_lines(value, lambda _, entry: _table(entry, spell))}\n}}"
        return json.dumps(value)

    found = model.get("files") if isinstance(model, dict) else None
    hashed = isinstance(found, dict) and any(isinstance(f, dict) and f.get("tensors") for f in found.values())
    return _table(model, spell) if hashed else json.dumps(model)


def _table(value: Any, spell: Callable[[str, Any], str]) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return f"{{{', '.join(f'{json.dumps(key)}: {spell(key, entry)}' for key, entry in value.items())}}}"


def _lines(table: Mapping[str, Any], spell: Callable[[str, Any], str]) -> str:
    return ",".join(f"\n{json.dumps(key)}: {spell(key, value)}" for key, value in table.items())


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder; CheckpointError when it is missing, malformed or altered."""
    path = folder / MANIFEST
    if files.kind(path) == "nothing":
        cure = "name the output of a merge; continue one that did not finish with --resume"
        raise CheckpointError(folder, f"has no {MANIFEST}", cure)
    text = files.read_small(path, MAX_MANIFEST)
    manifest = parse_json(text, path, AGAIN)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(path, f"is no {FORMAT}", AGAIN_NOW)
    if to_bytes(manifest) != text:
        raise CheckpointError(path, "its digest does not match its content", AGAIN)
    try:
        _SHAPE.validate_python(manifest)
    except ValidationError as failure:
        place = ".".join(map(str, failure.errors()[0]["loc"]))
        raise CheckpointError(path, f"{place!r} is malformed", AGAIN_NOW) from None
    return manifest
