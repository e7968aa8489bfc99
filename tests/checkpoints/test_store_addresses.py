"""Addresses lead to one bucket of a store that was named, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import failed, run

from acemerge.checkpoints.address import parse, place_of, scheme_of
from acemerge.checkpoints.named import output_path
from acemerge.errors import CheckpointError, UsageError, addressed

GOOD = {
    "s3://bucket/models/base": ("s3", "bucket", "models/base"),
    "s3://bucket": ("s3", "bucket", ""),
    "gs://my.bucket/a b/é": ("gs", "my.bucket", "a b/é"),
    "az://container/x/": ("az", "container", "x"),
    "hf://org/name@main/sub": ("hf", "org/name@main", "sub"),
    "memory://bucket/x": ("memory", "bucket", "x"),
}
HOSTS = ("169.254.169.254", "127.0.0.1", "10.0.0.1", "[fe80::1]", "user:word@bucket", "bucket:9000", "UPPER")
HOSTILE = (
    *(f"{scheme}://{host}/x" for scheme in ("s3", "gs", "az") for host in HOSTS[:6]),
    *("s3://bucket/../other", "s3://bucket/a/../../b", "s3://bucket/./a", "s3://bucket//a", "s3://../a", "s3://"),
    *("s3:///a", "s3://b", "s3://bucket/a?versionId=1", "s3://bucket/a#b", "s3://bucket/%2e%2e/a", "s3://bucket/a\\b"),
    *("s3://bucket/a\nb", "s3://bucket/a\0", "s3://bucket/" + "a" * 2000, "gs://user@bucket/x", "az://a:b@c/x"),
    *(
        "http://host/x",
        "https://user:word@host/x",
        "file:///etc",
        "ftp://host/x",
        "data://x/y",
        "simplecache://s3://b/x",
    ),
    *("zip://a.zip/b", "git://host/x", "S3://bucket/x", "unknown://bucket/x", "javascript://x/y", "sftp://10.0.0.1/x"),
    *("hf://org", "hf://org/name/../x", "hf://u:p@org/name", "s3:/169.254.169.254/latest", "memory://a/../b"),
)


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_an_address_is_a_path_with_a_scheme(text: str, expected: tuple[str, str, str]) -> None:
    path = parse(text)
    assert path is not None
    place = place_of(path)
    assert (place.scheme, place.bucket, place.key) == expected
    assert parse(path) == path
    assert addressed(path) == text.rstrip("/")


@pytest.mark.parametrize("text", ["models/base", "org/name@rev", "C:/x", "/s3://x", "./a:/b", "s3", ""])
def test_what_is_none(text: str) -> None:
    assert parse(text) is None
    assert scheme_of(Path(text)) is None


def test_hostile_addresses_are_refused_by_every_reader(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before any store is opened, and without a password in it."""
    from acemerge.checkpoints import objects

    monkeypatch.setattr(objects, "store_of", lambda *_: pytest.fail("a store was opened"))
    for text in HOSTILE:
        result = run(capsys, "plan", "--base", text, "--expert", "e1")
        assert result[0] in (2, 3), (text, result)
        failed(result, result[0], "address|no such folder|names no model|bucket")
        assert "word" not in result[2]
        with pytest.raises(UsageError):
            output_path(text)


def test_messages_show_addresses_as_they_are_written() -> None:
    assert str(CheckpointError(Path("s3://b/k"), "not there", "see gs:/b/x")) == "s3://b/k: not there; see gs://b/x"
    for text in ("C:/x and a:b, at 12:/3", "models/:warning:/out"):
        assert addressed(text) == text
