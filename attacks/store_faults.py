"""Row 46: a store on a bad day. Faults at random requests of a merge from S3 to S3, some passing, some for good.

Of every two merges one is done in parts.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import acemerge
from acemerge.errors import AcemergeError
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case
from attacks.store_server import FAULTS, Proxy, s3_behind_a_proxy

ROW, FULL = 46, 200
_BUCKET = "attacked"
_PARTS, _SHARD = 2, 600
_PART = 256  # bytes, so that small files go up in parts


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, case, chance = Tally(), Case(folder, "average"), random.Random(seed)
    with s3_behind_a_proxy(_PART) as (proxy, client):
        client.create_bucket(Bucket=_BUCKET)
        models = [_put(client, model) for model in (case.base, *case.experts)]
        calls = [_untouched(proxy, models, in_parts) for in_parts in (False, True)]
        for trial in range(count):
            in_parts = trial % 2 == 1
            fault, at, passing = chance.choice(FAULTS), chance.randrange(calls[in_parts]), chance.random() < 0.5
            label = f"{fault} at request {at}{', once' if passing else ''}{', in parts' if in_parts else ''}"
            clean(tally, label, partial(_merged, proxy, client, models, trial, fault, at, passing, in_parts))
    return tally


def _put(client: Any, model: Path) -> str:
    for file in model.iterdir():
        client.put_object(Bucket=_BUCKET, Key=f"{model.name}/{file.name}", Body=file.read_bytes())
    return f"s3://{_BUCKET}/{model.name}"


def _merge(models: list[str], out: str, in_parts: bool = False, resume: bool = False) -> None:
    rounds: list[dict[str, Any]] = [{"resume": resume}]
    if in_parts and not resume:
        rounds = [{"shard": f"{number}/{_PARTS}"} for number in range(1, _PARTS + 1)] + [{"finish": True}]
    for options in rounds:
        acemerge.merge(models[0], models[1:], "average", out, max_shard_size=_SHARD, force=True, **options)


def _untouched(proxy: Proxy, models: list[str], in_parts: bool) -> int:
    """How many requests a merge makes."""
    proxy.choose = lambda number, method, path: None
    proxy.asked.clear()
    _merge(models, f"s3://{_BUCKET}/{'parts' if in_parts else 'plain'}", in_parts)
    return len(proxy.asked)


def _merged(
    proxy: Proxy, client: Any, models: list[str], trial: int, fault: str, at: int, passing: bool, in_parts: bool
) -> None:
    """Done, or refused with nothing published and no secret told; then gone on with, to the same bytes."""
    name = f"out-{trial}"
    out = f"s3://{_BUCKET}/{name}"
    proxy.asked.clear()

    def choose(number: int, method: str, path: str) -> str | None:
        return fault if number == at or (number > at and not passing) else None

    proxy.choose = choose
    try:
        _merge(models, out, in_parts)
    except AcemergeError as refusal:
        check("AKIAEXAMPLE" not in str(refusal), "a key is in the message")
        check("acemerge.json" not in _held(client, name) or fault in ("lost answer", "truncated"), "it is published")
        raise
    finally:
        proxy.choose = lambda number, method, path: None
        _merge(models, out, resume=True)
        check(_weights(client, name) == _weights(client, "plain"), "other bytes")
        left = _left_parts(client)
        # A store that refuses everything from then on takes no abort either.
        check(not (left and passing), "parts of an upload are left")


def _left_parts(client: Any) -> int:
    """Of uploads that were never complete, which go. One whose very beginning got no answer has none: nobody was told
    its number, and it costs nothing.
    """
    count = 0
    for upload in client.list_multipart_uploads(Bucket=_BUCKET).get("Uploads", []):
        named = {"Bucket": _BUCKET, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        count += len(client.list_parts(**named).get("Parts", []))
        client.abort_multipart_upload(**named)
    return count


def _held(client: Any, name: str) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=_BUCKET, Prefix=f"{name}/").get("Contents", [])
    read = {about["Key"]: client.get_object(Bucket=_BUCKET, Key=about["Key"])["Body"].read() for about in listed}
    return {key.removeprefix(f"{name}/"): data for key, data in read.items()}


def _weights(client: Any, name: str) -> dict[str, bytes]:
    """And whatever else is there but the manifest, which has times."""
    return {key: data for key, data in _held(client, name).items() if key != "acemerge.json"}


if __name__ == "__main__":
    main(("store_faults",))
