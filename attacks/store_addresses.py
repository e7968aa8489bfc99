"""Row 50: addresses that would lead elsewhere. Refused before anything is opened, without a password in the message."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import acemerge
from acemerge.errors import AcemergeError
from attacks.harness import Tally, check, clean, main

ROW, FULL = 50, 150
_HOSTS = ("169.254.169.254", "127.0.0.1", "[fd00:ec2::254]", "user:hunter2@bucket", "bucket:80", "UPPER", "a", "-a-")
_KEYS = ("../x", "a/../../x", "./x", "a//x", "/x", "a?hunter2", "a#x", "%2e%2e/x", "a\\x", "a\nx", "a\0x", "x" * 2000)
_OTHERS = (
    *("http://169.254.169.254/latest", "https://user:hunter2@host/x", "file:///etc/passwd", "ftp://host/x"),
    *(
        "data://x",
        "zip://a::s3://b/x",
        "filecache://s3/b",
        "github://org:repo@main/x",
        "unknown://bucket/x",
        "S3://bb/x",
    ),
    *("hf://org", "hf://user:hunter2@org/name", "hf://org/name/../../x", "sftp://10.0.0.1/x", "memory://b/../x"),
)


def addresses() -> list[str]:
    found = [f"{scheme}://{host}/x" for scheme in ("s3", "gs", "az") for host in _HOSTS]
    found += [f"{scheme}://bucket/{key}" for scheme in ("s3", "gs", "az") for key in _KEYS]
    return [*found, *_OTHERS]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Each as an input and as an output, up to the count; the seed has nothing to choose."""
    tally = Tally()
    cases = [(address, role) for address in addresses() for role in ("input", "output")]
    with patch.object(socket.socket, "connect", side_effect=AssertionError("a connection was opened")):
        for address, role in cases[:count]:
            clean(tally, f"{address[:60]!r} as {role}", partial(_refused, folder, address, role), must="refuse")
    return tally


def _refused(folder: Path, address: str, role: str) -> Any:
    from acemerge.checkpoints import objects

    inputs = (address, [address]) if role == "input" else (folder / "none", [folder / "none"])
    opened = AssertionError("a store was opened")
    try:
        with patch.object(objects, "store_of", side_effect=opened):
            return acemerge.merge(*inputs, out=address if role == "output" else None)
    except AcemergeError as refusal:
        check("hunter2" not in str(refusal), "the message has a password")
        check(role == "input" or "address" in str(refusal), f"refused for something else: {refusal}")
        raise


if __name__ == "__main__":
    main(("store_addresses",))
