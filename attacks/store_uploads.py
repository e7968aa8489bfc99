"""Row 47: uploads broken off at every part, and two runs on one address."""

from __future__ import annotations

import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import acemerge
from acemerge.errors import AcemergeError, WriteError
from acemerge.output.verify import verify
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case
from attacks.store_server import Proxy, s3_behind_a_proxy

ROW, FULL = 47, 100
_BUCKET, _PART = "attacked", 256
_KINDS = ("500", "reset", "expired", "lost answer")


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Half of the cases are races, the others parts: each of them, by turns with each kind of fault."""
    tally, case = Tally(), Case(folder, "average")
    with s3_behind_a_proxy(_PART) as (proxy, client):
        client.create_bucket(Bucket=_BUCKET)
        acemerge.merge(case.base, case.experts, "average", f"s3://{_BUCKET}/whole")
        parts = sum("partNumber=" in call for call in proxy.asked)
        check(parts > 1, "no file is uploaded in parts")
        for trial in range(count):
            out = f"out-{trial}"
            if trial % 2:
                clean(tally, f"race {trial}", partial(_race, client, case, out), must="accept")
            else:
                part, kind = trial // 2 % parts, _KINDS[trial // 2 % len(_KINDS)]
                label = f"{kind} at part {part}"
                clean(tally, label, partial(_broken_off, proxy, client, case, out, part, kind), must="refuse")
    return tally


def _keys(client: Any, out: str) -> set[str]:
    listed = client.list_objects_v2(Bucket=_BUCKET, Prefix=f"{out}/").get("Contents", [])
    return {about["Key"].removeprefix(f"{out}/") for about in listed}


def _broken_off(proxy: Proxy, client: Any, case: Case, out: str, part: int, kind: str) -> None:
    seen: list[str] = []

    def choose(number: int, method: str, path: str) -> str | None:
        if method == "PUT" and "partNumber=" in path:
            seen.append(path)
            return kind if len(seen) > part else None
        return None

    proxy.choose = choose
    try:
        acemerge.merge(case.base, case.experts, "average", f"s3://{_BUCKET}/{out}")
    except WriteError:
        left = _keys(client, out)
        broken = urllib.parse.urlsplit(seen[part]).path.removeprefix(f"/{_BUCKET}/{out}/")
        check(not {broken, "acemerge.json"} & left, f"{broken} is broken off, and there are {sorted(left)}")
        check(not client.list_multipart_uploads(Bucket=_BUCKET).get("Uploads"), "parts are left")
        raise
    finally:
        proxy.choose = lambda number, method, path: None


def _race(client: Any, case: Case, out: str) -> None:
    start, address = Barrier(2), f"s3://{_BUCKET}/{out}"

    def run(method: str) -> str:
        start.wait()
        try:
            acemerge.merge(case.base, case.experts, method, address)
        except AcemergeError as refusal:
            return str(refusal)
        return "done"

    with ThreadPoolExecutor(2) as racers:
        outcomes = list(racers.map(run, ("average", "task_arithmetic")))
    check(outcomes.count("done") == 1, f"outcomes {outcomes}")
    rule = verify(address)["recipe"]["method"]["name"]
    check(rule == ("average", "task_arithmetic")[outcomes.index("done")], f"the output is by {rule}")
    check(not {name for name in _keys(client, out) if name.startswith(".acemerge")}, "notes are left")


if __name__ == "__main__":
    main(("store_uploads",))
