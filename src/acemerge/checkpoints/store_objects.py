"""S3, Google Cloud Storage and Azure by obstore. Credentials are those of each store's own chain."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from acemerge.checkpoints.store import Kind, Listing, Stat, StoreFailure
from acemerge.errors import UsageError

PART = 16 << 20  # of an upload; S3 takes 10,000, and a shard of more than that would be refused anyway
_MOST_PARTS = 9_000
_PARTS_IN_FLIGHT = 4
_CONNECT, _ANSWER = "5s", "120s"
_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_DENIED = {"401", "403"}
_OUT_OF_DATE = {"ExpiredToken", "RequestTimeTooSkewed", "TokenRefreshRequired"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
# What the names of a store's settings begin with, and those of its address, where it is not the provider's own.
_SETTINGS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": (),  # it stands in the file of a service account
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


def open_objects(scheme: str, bucket: str) -> ObjectStore:
    """A bucket by its name. UsageError where obstore is not installed, or the environment says too little."""
    try:
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError:
        cure = "pip install 'acemerge[cloud]', or copy the model into a folder"
        raise UsageError(f"{scheme}://{bucket}", "obstore is not installed, which reads and writes it", cure) from None
    _check_plain_http(scheme, bucket)
    kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    client = {"timeout": _ANSWER, "connect_timeout": _CONNECT, **_plain_http(scheme)}
    try:
        return ObjectStore(kinds[scheme](bucket, client_options=client, retry_config=_RETRIES))
    except Exception:  # of the configuration that it found; its words may hold that
        cure = "set what this store needs, as AWS_REGION or AZURE_STORAGE_ACCOUNT_NAME"
        raise UsageError(f"{scheme}://{bucket}", "the environment's settings for it are not complete", cure) from None


def _plain_http(scheme: str) -> dict[str, bool]:
    """Given with other options, these are no longer taken from the environment."""
    wanted = os.environ.get(f"{_SETTINGS[scheme]}_ALLOW_HTTP", "")
    return {"allow_http": True} if wanted.lower() in ("1", "true", "yes", "on") else {}


def _check_plain_http(scheme: str, bucket: str) -> None:
    """obstore would ask again and again, and say at last that nobody answers."""
    named = next((name for name in _ENDPOINTS[scheme] if os.environ.get(name)), None)
    if named and os.environ[named].startswith("http://") and not _plain_http(scheme):
        what = f"{named} has no TLS, which is only taken where it is allowed"
        cure = f"set {_SETTINGS[scheme]}_ALLOW_HTTP=true, or name an https:// endpoint"
        raise UsageError(f"{scheme}://{bucket}", what, cure)


class ObjectStore:
    """One bucket; `client` is obstore's."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def stat(self, key: str) -> Stat:
        with _failures():
            return _stat(self._client.head(key))

    def listing(self, prefix: str) -> Listing:
        with _failures():
            found = self._client.list_with_delimiter(f"{prefix}/" if prefix else None)
        names = {about["path"].rpartition("/")[2]: _stat(about) for about in found["objects"]}
        return Listing(names, tuple(path.rpartition("/")[2] for path in found["common_prefixes"]))

    def read(self, key: str, start: int, end: int, expected: Stat) -> bytes:
        options: dict[str, Any] = {"range": (start, end)}
        if expected.etag:
            options["if_match"] = expected.etag
        if expected.version:
            options["version"] = expected.version
        with _failures():
            return bytes(self._client.get(key, options=options).bytes())

    def put(self, key: str, data: bytes, new: bool = False) -> Stat:
        with _failures():
            done = self._client.put(key, data, mode="create" if new else "overwrite", use_multipart=False)
        return Stat(len(data), done["e_tag"] or "", done["version"] or "")

    def upload(self, key: str, file: Path) -> Stat:
        size = file.stat().st_size
        part = max(PART, -(-size // _MOST_PARTS))
        with _lost_uploads(), _failures():
            done = self._client.put(key, file, chunk_size=part, max_concurrency=_PARTS_IN_FLIGHT)
        return Stat(size, done["e_tag"] or "", done["version"] or "")

    def delete(self, key: str) -> None:
        with _failures(), contextlib.suppress(FileNotFoundError):
            self._client.delete(key)


def _stat(about: Any) -> Stat:
    return Stat(about["size"], about["e_tag"] or "", about["version"] or "")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """obstore's errors as StoreFailure."""
    from obstore import exceptions

    kinds: tuple[tuple[type[Exception], Kind], ...] = (
        (FileNotFoundError, "missing"),
        (exceptions.AlreadyExistsError, "exists"),
        (exceptions.PreconditionError, "changed"),
        (exceptions.PermissionDeniedError, "refused"),
        (exceptions.UnauthenticatedError, "refused"),
    )
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as failure:
        kind: Kind = next((kind for error, kind in kinds if isinstance(failure, error)), "passing")
        raise told(kind, str(failure)) from None


@contextlib.contextmanager
def _lost_uploads() -> Iterator[None]:
    """What is missing where an object is uploaded is the upload, not the object: another may do.

    The store forgot it, or it was complete when the answer was lost, and there was nothing to abort.
    """
    try:
        yield
    except StoreFailure as failure:
        if failure.kind != "missing":
            raise
        raise StoreFailure("passing", "the store lost the upload") from None


def told(kind: Kind, message: str) -> StoreFailure:
    """The failure in our own words: of the library's only the status and the store's code."""
    status, code = _STATUS.search(message), _CODE.search(message)
    number, name = status[1] if status else "", code[1] if code else ""
    if name in _NO_BUCKET:
        return StoreFailure("refused", f"there is no such bucket ({name})")
    if name in _OUT_OF_DATE:
        return StoreFailure("refused", f"the credentials are out of date ({name})")
    if kind == "refused" or number in _DENIED:
        return StoreFailure("refused", f"access is refused ({name or number or 'no credentials'})")
    if number in ("301", "307", "400"):
        return StoreFailure("refused", f"the store does not take the request ({name or number})")
    if kind == "passing":
        what = f"the store answers {' '.join(filter(None, (number, name)))}" if number else "the store does not answer"
        return StoreFailure(kind, what)
    return StoreFailure(kind, kind)
