"""A whole model from start to exit, beside what its layers take by themselves and what its bytes take.

    .venv/bin/python benchmarks/whole.py --layout llama-3.2-3b --models FOLDER --rules ace,auto,average
    .venv/bin/python benchmarks/whole.py --layout llama-3.2-3b@1 --models FOLDER --rules ace          # one block of it

Makes the checkpoints that FOLDER lacks. `own s` is the sum of what the rules take: one tensor of every kind that the
plan knows, its own task vectors from the files, merged by itself in this process, times how many there are. `bytes s`
is one read of all models and one write of the output, nothing in the system's cache, at the speed of the base's files.
`over` is the run's time over both. `tensors s` is the same sum by the manifest, made while files were read and written.
`expected` is what the plan says, measured rates included, over the run's time. `products` is the share of it that the
rule's products take at the rate of a float32 product.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import LAYOUTS, weight_files, write_all
from engine import OURS, Run, matrix_operations, prepare_cache, run
from measure import product_rate
from rules import names
from safetensors import safe_open
from tables import context, fixed, seconds
from torch import Tensor

import acemerge
from acemerge.engine.expected import expected_seconds
from acemerge.engine.foreseen import expected_memory
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.planning.jobs import ByRule, Plan
from acemerge.recipes.recipe import make_recipe

HEAD = (
    *("rule", "s", "over", "own s", "bytes s", "tensors s", "expected", "CPU s", "products", "peak MB", "peak RSS MB"),
    *("planned MB", "others", "statuses"),
)
ENTRIES = 1 << 24  # of a larger tensor that is merged entry by entry so many are timed
WRITTEN = 1 << 22


@dataclass(frozen=True)
class Kind:
    """Tensors that one rule merges in one shape: how many, the name of one, and seconds of that by itself."""

    rule: str
    shape: tuple[int, ...]
    count: int
    name: str
    seconds: float


def own_times(plan: Plan, models: dict[str, Path], repeats: int) -> Iterator[Kind]:
    """Every kind of tensor by itself."""
    jobs = [job for job in plan.jobs if isinstance(job, ByRule)]
    count = Counter((job.rule, job.spec.shape) for job in jobs)
    for job in {(job.rule, job.spec.shape): job for job in jobs}.values():
        base, *experts = (_read(model, job.name) for model in models.values())
        if job.entrywise and base.numel() > ENTRIES:
            rows = max(1, ENTRIES // base[0].numel())
            share = len(base) / rows
            base, experts = base[:rows], [expert[:rows] for expert in experts]
        else:
            share = 1.0
        wide = base.float()
        deltas = torch.stack([expert.float().sub_(wide) for expert in experts])
        del experts
        times = []
        while len(times) < repeats and (not times or times[0] < 20):
            started = time.perf_counter()
            known = {"base": wide} if job.method.needs.wants_base else {}
            acemerge.merge_deltas(deltas, job.method, **known)
            times.append(time.perf_counter() - started)
        key = job.rule, job.spec.shape
        yield Kind(*key, count[key], job.name, share * min(times))


def _read(model: Path, name: str) -> Tensor:
    for file in weight_files(model):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                found: Tensor = opened.get_tensor(name)
                return found.clone()
    raise KeyError(name)


def bytes_times(models: dict[str, Path], work: Path) -> tuple[float, float]:
    """Seconds to read all models once, and to write one and have it on disk, at the speed of the base's."""
    files = weight_files(models["base"])
    prepare_cache(files, warm=False)
    started = time.perf_counter()
    prepare_cache(files, warm=True)
    read = time.perf_counter() - started
    size, block = sum(file.stat().st_size for file in files), os.urandom(WRITTEN)
    started = time.perf_counter()
    with (work / "bytes").open("wb", buffering=0) as file:
        for _ in range(size // WRITTEN):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - started
    (work / "bytes").unlink()
    prepare_cache(files, warm=False)
    return read * len(models), written


def measured(rule: str, models: dict[str, Path], rate: float, arguments: argparse.Namespace) -> str:
    """One row, and below it every kind of tensor: alone, and as the manifest has it."""
    shapes = LAYOUTS[arguments.layout]().shapes
    with tempfile.TemporaryDirectory(prefix="whole-", dir=arguments.models) as folder:
        work = Path(folder)
        base, *experts = (str(model.resolve()) for model in models.values())
        recipe = {"base": base, "experts": experts, "method": rule}
        (work / "recipe.yaml").write_text(json.dumps(recipe) + "\n")
        opened = open_recipe(make_recipe(recipe), None, RunOptions())
        plan = opened.plan
        planned = expected_memory(plan)
        reading, writing = bytes_times(models, work)
        expected = expected_seconds(opened, plan, work)
        command = [str(OURS), "merge", str(work / "recipe.yaml"), "-o", str(work / "out"), "--quiet"]
        done: Run = run(command, arguments.threads, arguments.timeout)
        if done.error:
            return f"| {rule} | {done.error} |"
        records = json.loads((work / "out" / "acemerge.json").read_text())["tensors"]
        shutil.rmtree(work / "out")
    kinds = list(own_times(plan, models, arguments.repeats))
    own, by_bytes = sum(kind.count * kind.seconds for kind in kinds), reading + writing
    flop = matrix_operations(records, plan.recipe.method.name, shapes, len(experts))
    statuses = Counter(record["status"] for record in records.values())
    cells = [
        *(rule, seconds(done.seconds), fixed(done.seconds / (own + by_bytes)), seconds(own), seconds(by_bytes)),
        *(seconds(sum(record["seconds"] for record in records.values())), fixed(expected / done.seconds)),
        *(seconds(done.cpu_seconds), f"{flop / rate / 1e9 / done.seconds:.0%}" if flop else ""),
        *(fixed(size / 1e6, 0) for size in (done.peak_anonymous, done.peak_rss, planned)),
        *(f"{done.others:.0%}", ", ".join(f"{count} {status}" for status, count in statuses.items())),
    ]
    lines = [f"| {' | '.join(cells)} |", ""]
    for kind in kinds:
        took = [r["seconds"] for n, r in records.items() if r["rule"] == kind.rule and shapes[n] == kind.shape]
        size = " x ".join(map(str, kind.shape))
        mean = sum(took) / max(1, len(took))
        lines.append(
            f"  {kind.count:3} {kind.rule:10} {size:16} {kind.seconds:8.4f} s alone, {mean:8.4f} s in the merge"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layout", default="llama-3.2-3b@1", choices=list(LAYOUTS))
    parser.add_argument("--models", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--rules", default=["ace", "auto", "average"], type=names, help="comma-separated")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="of a tensor by itself; the best counts")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a run is given up")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    warm_up = run([sys.executable, "-c", "import acemerge.cli.app; from transformers import LlamaForCausalLM"], 1, 600)
    if warm_up.error:
        raise SystemExit(warm_up.error)
    models = write_all(arguments.models, arguments.layout, 3)
    about, rate = context("none", arguments.threads), product_rate()
    print(
        f"`{shlex.join(['benchmarks/whole.py', *sys.argv[1:]])}`: {about['cpu']}, {about['threads']} threads,", end=" "
    )
    print(f"torch {about['torch']}, {rate:.0f} GFLOP/s\n\n| {' | '.join(HEAD)} |")
    print(f"|---|{'--:|' * (len(HEAD) - 2)}---|", flush=True)
    for rule in arguments.rules:
        print(measured(rule, models, rate, arguments), flush=True)


if __name__ == "__main__":
    main()
