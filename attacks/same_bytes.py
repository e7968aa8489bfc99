"""Row 22: worker counts, hash seeds and the order of a directory's files: the same SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, snapshot

ROW, FULL = 22, 27
_METHODS = ("ace", "ties", "dare_ties", "emr", "tsv_m", "wudi")
_RUN = """
import json, os, random, sys
import acemerge
from acemerge.checkpoints import files
from attacks.faulty import faulty
base, *experts, out, workers, shuffle = sys.argv[1:]
def shuffled(call, *arguments, **options):
    found = call(*arguments, **options)
    if call is os.listdir:
        random.Random(int(shuffle)).shuffle(found)
    return found
with faulty(1, shuffled, lasting=True):
    for method in {methods}:
        acemerge.merge(base, experts, out=out + "/" + method, method=method, workers=int(workers), seed=3,
                       max_shard_size="20KB")
"""


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, case = Tally(), Case(folder, "average", layers=6, side=48)
    settings = [(w, h, s) for s in range(3) for h in range(3) for w in (1, 2, 3)][:count]
    expected: dict[str, str] = {}

    def compare(workers: int, hash_seed: int, shuffle: int) -> None:
        found = _merge_all(case, folder / f"{workers}-{hash_seed}-{shuffle}", workers, hash_seed, shuffle)
        differing = [name for name in found if expected.setdefault(name, found[name]) != found[name]]
        check(not differing and found.keys() == expected.keys(), f"{differing} differ")

    for workers, hash_seed, shuffle in settings:
        label = f"{workers} workers, hash seed {hash_seed}, shuffle {shuffle}"
        clean(tally, label, partial(compare, workers, hash_seed, shuffle), must="accept")
    return tally


def _merge_all(case: Case, out: Path, workers: int, hash_seed: int, shuffle: int) -> dict[str, str]:
    """The SHA-256 of every file that all methods write in a process of their own, but for times."""
    words = [*map(str, (case.base, *case.experts, out, workers, shuffle))]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    program = _RUN.format(methods=json.dumps(_METHODS))
    subprocess.run([sys.executable, "-c", program, *words], check=True, env=environment, cwd=Path(__file__).parents[1])
    files = {f"{m}/{name}": data for m in _METHODS for name, data in snapshot(out / m).items()}
    return {n: hashlib.sha256(d).hexdigest() for n, d in files.items() if not n.endswith("acemerge.json")}


if __name__ == "__main__":
    main(("same_bytes",))
