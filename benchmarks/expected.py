"""How far the time that `acemerge merge` expects is from the time that it takes.

    .venv/bin/python benchmarks/checkpoints.py llama-3.2-3b/8 FOLDER     # and llama-3.2-3b@4
    .venv/bin/python benchmarks/expected.py FOLDER/llama-3.2-3b-8 FOLDER/llama-3.2-3b@4 --rules average,ties,ace

Each rule's merge is expected, run and timed, once with the inputs in the system's cache and once without; the output is
written beside the models and removed. A machine that has other work changes from one moment to the next: the rates are
measured just before the merge, as the command does it. `ratio` is what was expected over what it took. `CPU s` is the
processor time of this process, `others` the share of the processors that other processes took meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from checkpoints import weight_files
from engine import busy, prepare_cache
from rules import names

from acemerge.api import run_opened
from acemerge.checkpoints.machine import keep_freed_memory
from acemerge.engine.expected import expected_seconds
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import make_recipe

HEAD = ("model", "rule", "cache", "expected s", "s", "ratio", "CPU s", "others")


def measured(models: Path, rule: str, cache: str) -> list[str]:
    """The cells of one row."""
    experts, out, options = sorted(models.glob("expert-*")), models / f"expected-{rule}", RunOptions(overwrite=True)
    content = {"base": str(models / "base"), "experts": [str(path) for path in experts], "method": rule}
    prepare_cache((file for model in (models / "base", *experts) for file in weight_files(model)), cache == "warm")
    opened = open_recipe(make_recipe(content), out, options)
    expected = expected_seconds(opened, opened.plan, out)
    started, processor, before = time.perf_counter(), time.process_time(), busy()
    try:
        run_opened(opened, out, options)
    finally:
        took, processor = time.perf_counter() - started, time.process_time() - processor
        shutil.rmtree(out, ignore_errors=True)
    others = max(0.0, busy() - before - processor) / took / (os.cpu_count() or 1)
    figures = (f"{expected:.1f}", f"{took:.1f}", f"{expected / took:.2f}", f"{processor:.1f}", f"{others:.0%}")
    return [models.name, rule, cache, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders with base, expert-1, ...")
    parser.add_argument("--rules", default="average,ties,ace,kron_auto,tsv_m", type=names, help="comma-separated")
    parser.add_argument("--cache", default=["warm", "cold"], type=names, help="warm, cold or both")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    print(f"`{shlex.join(['benchmarks/expected.py', *sys.argv[1:]])}`\n\n| {' | '.join(HEAD)} |")
    print(f"|---|---|---|{'--:|' * (len(HEAD) - 3)}", flush=True)
    for models in arguments.models:
        for rule in arguments.rules:
            for cache in arguments.cache:
                print(f"| {' | '.join(measured(models, rule, cache))} |", flush=True)


if __name__ == "__main__":
    main()
