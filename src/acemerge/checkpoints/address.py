"""Addresses of what lies in a store: `s3://bucket/key`, `gs://`, `az://`, `hf://`, or another scheme by fsspec.

Inside, an address is a path whose first part is its scheme: `Path("s3://bucket/key")` is `s3:/bucket/key`, and `/`,
`parent`, `name` and `is_relative_to` mean what they mean for folders. Whoever takes one from a user asks `parse`.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from acemerge.errors import UsageError

OBJECT_STORES = ("s3", "gs", "az")
HUB = "hf"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
# Of S3, Google and Azure together. An IP address is none: what looks like a bucket must not be a host.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_IP = re.compile(r"[\d.]+")
_LONGEST = 1024  # of a key, in every store
# What fsspec may serve. Its other schemes are of this machine, of any web address, or wrap further addresses.
_BY_FSSPEC = {
    *("abfs", "abfss", "adl", "gcs", "hdfs", "lakefs", "memory", "oci", "oss", "r2", "s3a", "sftp", "smb", "ssh"),
    *("swift", "tos", "webhdfs"),
}
_CURE = "write s3://bucket/folder, gs://, az:// or hf://org/name, or name a folder"


@dataclass(frozen=True)
class Place:
    """Where an address leads: a bucket (of the Hub `org/name@commit`) of a scheme, and the key therein."""

    scheme: str
    bucket: str
    key: str


def scheme_of(path: Path) -> str | None:
    """The scheme of an address; None for a path on this machine."""
    first = path.parts[0] if path.parts else ""
    return first[:-1] if len(first) > 2 and first.endswith(":") and _SCHEME.fullmatch(f"{first}/") else None


def place_of(path: Path) -> Place:
    """Of an address that was checked."""
    scheme, *parts = path.parts
    count = 2 if scheme == f"{HUB}:" else 1
    return Place(scheme[:-1], "/".join(parts[:count]), "/".join(parts[count:]))


def is_address(text: str | Path) -> bool:
    """Whether this is one of whatever kind, and no path on this machine."""
    return _SCHEME.match(str(text)) is not None


def parse(text: str | Path, writing: bool = False) -> Path | None:
    """An address as a path; None for what is none. For `writing`, that of the Hub is refused, too.

    UsageError for a scheme that is not known, and for whatever could lead elsewhere than to one bucket: a user, a
    port, a query, `..`, an empty part.
    """
    found = _SCHEME.match(str(text))
    if found is None:
        return None
    scheme, rest = found[1], str(text)[found.end() :].removeprefix("/")
    if writing and (scheme == HUB or not _is_known(scheme)):
        what = "is an address, and only folders and object stores are written to"
        raise UsageError(without_user(text), what, "name a folder, upload it from there")
    if not _is_known(scheme):
        raise UsageError(without_user(text), "is an address of a kind that is not known here", _CURE)
    reason = _wrong(scheme, rest.removesuffix("/"))
    if reason:
        raise UsageError(without_user(text), f"is no address of a store: {reason}", _CURE)
    return Path(f"{scheme}:/{rest}")


def _is_known(scheme: str) -> bool:
    """Whether obstore has it, or fsspec is there and has."""
    if scheme in (*OBJECT_STORES, HUB):
        return True
    if scheme not in _BY_FSSPEC or importlib.util.find_spec("fsspec") is None:
        return False
    from fsspec.registry import known_implementations

    return scheme in known_implementations


def _wrong(scheme: str, rest: str) -> str:
    """What is wrong with the part behind the scheme; empty where nothing is."""
    bucket, *parts = rest.split("/")
    if len(rest) > _LONGEST or not rest.isprintable() or "\\" in rest:
        return "it is too long, or has characters that no key has"
    if "@" in bucket:
        return "it names a user, and credentials are taken from the environment alone"
    if set(rest) & {"?", "#", "%"}:
        return "it has a query, a fragment or an escape"
    if scheme != HUB and (not _BUCKET.fullmatch(bucket) or _IP.fullmatch(bucket)):
        return f"{bucket[:80]!r} is no name of a bucket"
    if any(part in ("", ".", "..") for part in (bucket, *parts)):
        return "a part of it is empty, . or .."
    return ""


def without_user(text: str | Path) -> str:
    """The text without what may be a password."""
    scheme, slashes, rest = str(text).partition("//")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"
    return shown.partition("?")[0][:200]
