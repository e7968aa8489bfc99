"""Row 48: an object is replaced before a random request of a merge. The run is of the old or of the new, or refused."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import acemerge
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, content
from attacks.store_server import Proxy, s3_behind_a_proxy

ROW, FULL = 48, 50
_BUCKET = "attacked"


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, case, chance = Tally(), Case(folder, "average"), random.Random(seed)
    with s3_behind_a_proxy(1 << 20) as (proxy, client):
        client.create_bucket(Bucket=_BUCKET)
        files = {f"{m.name}/{f.name}": f.read_bytes() for m in (case.base, *case.experts) for f in m.iterdir()}
        _put(client, files)
        old = _merged(folder / "old")
        calls = len(proxy.asked)
        weights = [name for name in files if name.endswith(".safetensors")]
        others = {key: {key: _changed(files[key])} for key in weights}
        new: dict[str, dict[str, Any]] = {}  # what is made of each
        for trial in range(count):
            key, at = chance.choice(weights), chance.randrange(calls)
            replace = partial(_put, client, others[key])
            if key not in new:
                replace()
                new[key] = _merged(folder / f"new-{trial}")
                _put(client, {key: files[key]})
            out = folder / f"out-{trial}"
            clean(tally, f"{key} before request {at}", partial(_replaced, proxy, out, at, replace, (old, new[key])))
            _put(client, {key: files[key]})
    return tally


def _changed(content: bytes) -> bytes:
    """With another number at its end."""
    data = bytearray(content)
    data[-3] ^= 1
    return bytes(data)


def _put(client: Any, files: dict[str, bytes]) -> None:
    for key, data in files.items():
        client.put_object(Bucket=_BUCKET, Key=key, Body=data)


def _merged(out: Path) -> dict[str, Any]:
    experts = [f"s3://{_BUCKET}/{name}" for name in ("one", "two")]
    acemerge.merge(f"s3://{_BUCKET}/base", experts, "average", out)
    return content(out)


def _replaced(proxy: Proxy, out: Path, at: int, replace: Any, versions: tuple[dict[str, Any], ...]) -> None:
    proxy.asked.clear()

    def choose(number: int, method: str, path: str) -> None:
        if number == at:
            replace()

    proxy.choose = choose
    try:
        check(_merged(out) in versions, "the output is of neither")
    finally:
        proxy.choose = lambda number, method, path: None
        check((out / "acemerge.json").exists() or not out.exists(), "something is left")


if __name__ == "__main__":
    main(("store_changes",))
