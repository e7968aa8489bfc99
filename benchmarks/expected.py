"""How far the time that `acemerge merge` expects is from the time that it takes.

    .venv/bin/python benchmarks/checkpoints.py llama-3.2-3b/8 FOLDER
    .venv/bin/python benchmarks/expected.py FOLDER/llama-3.2-3b-8 --rules ace,average,ties,tsv_m

Each rule's merge is expected, run and timed; the output is written beside the models and removed. A machine that has
other work changes from one moment to the next: the rates are measured just before the merge, as the command does it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from acemerge.api import run_opened
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.planning.estimate import measure_rates, plan_seconds
from acemerge.recipes.recipe import make_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", type=Path, help="a folder with base, expert-1, ...")
    parser.add_argument("--rules", default="ace,actmat,average,ties,dare_ties,tsv_m,iso_c")
    arguments = parser.parse_args()
    experts = sorted(arguments.models.glob("expert-*"))
    for rule in arguments.rules.split(","):
        out = arguments.models / f"expected-{rule}"
        content = {"base": str(arguments.models / "base"), "experts": [str(path) for path in experts], "method": rule}
        opened = open_recipe(make_recipe(content), out, RunOptions(overwrite=True))
        expected = plan_seconds(opened.plan, measure_rates(torch.device("cpu")))
        started = time.perf_counter()
        run_opened(opened, out, RunOptions(overwrite=True))
        took = time.perf_counter() - started
        shutil.rmtree(out)
        print(f"{rule:12} expected {expected:7.1f} s, took {took:7.1f} s: {expected / took:.2f} times", flush=True)


if __name__ == "__main__":
    main()
