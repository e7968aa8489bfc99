"""Stores for tests: an S3 API on this machine, and one in memory whose calls can be made to fail."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from acemerge.checkpoints import objects, store
from acemerge.checkpoints.store_objects import ObjectStore

KEY, SECRET = "AKIAKNOWNONLYTOTESTS", "a-secret-that-nobody-may-see"


class S3:
    """A server that speaks S3, and its buckets."""

    def __init__(self) -> None:
        import boto3  # both take long to import, and few tests want them
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def bucket(self) -> str:
        """A new one."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, folder: Path, address: str) -> str:
        """The files of a folder under an address."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        for file in filter(Path.is_file, folder.rglob("*")):
            self.client.put_object(Bucket=bucket, Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())
        return address

    def contents(self, address: str) -> dict[str, bytes]:
        """What lies below an address, by names from there."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        listed = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        read = {o["Key"]: self.client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in listed}
        return {key.removeprefix(f"{prefix}/"): data for key, data in read.items()}

    def unfinished_uploads(self, bucket: str) -> int:
        return len(self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))

    def close(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, named in the environment as a user would."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    objects.forget_stores()
    return s3_server


# Stands between a call and the store: given the call's name and key, and what would do it, it gives the answer.
Fault = Callable[[str, str, Callable[[], Any]], Any]


def obeyed(name: str, key: str, call: Callable[[], Any]) -> Any:
    """No fault."""
    return call()


@dataclass
class FaultyClient:
    """obstore's store in memory, with faults."""

    fault: Fault = obeyed
    held: Any = field(default_factory=MemoryStore)
    calls: list[str] = field(default_factory=list)

    def _call(self, name: str, key: str, *args: Any, **options: Any) -> Any:
        self.calls.append(f"{name} {key}")
        return self.fault(name, key, lambda: getattr(self.held, name)(key, *args, **options))

    def head(self, key: str) -> Any:
        return self._call("head", key)

    def get(self, key: str, **options: Any) -> Any:
        return self._call("get", key, **options)

    def put(self, key: str, data: Any, **options: Any) -> Any:
        return self._call("put", key, data, **options)

    def delete(self, key: str) -> Any:
        return self._call("delete", key)

    def list_with_delimiter(self, prefix: str | None) -> Any:
        return self._call("list_with_delimiter", prefix or "")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FaultyClient:
    """The one bucket, whatever address is named; nobody waits before a call is repeated."""
    client = FaultyClient()
    held = ObjectStore(client)
    monkeypatch.setattr(objects, "store_of", lambda scheme, bucket: held)
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    return client
