"""Merge low-rank updates from their factors and from the full task vectors; print time and memory as Markdown.

    .venv/bin/python benchmarks/lowrank.py [--side 4096] [--rank 16] [--experts 8] [--rules ace,tsv_m] [--check]

Every measurement is a process of its own, on the same factors and number of threads. `full` forms the task vectors and
merges them; `factors` is `acemerge.merge_factors`; `and M` has formed the merged update, too. Times are the best of the
repeats after a warm-up at a sixteenth of the size, or the only one where it takes over a minute; memory is the peak of
the first that the inputs do not explain. With `--check` the last two columns are the distances of both results from
what full task vectors give in float64, relative to that. A rule on singular vectors may be far off from full float32
task vectors: their rounding is an update of full rank, and truncations as a share of the layer's size take it in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import memory, reset_peak

import acemerge
from acemerge.methods import METHODS

RULES = ("average", "task_arithmetic", "ace", "actmat", "tsv_m", "iso_c")
FORMS = ("full", "factors", "and M")
HEAD = (
    "rule",
    "full s",
    "factors s",
    "and M s",
    "ratio",
    "full MB",
    "factors MB",
    "and M MB",
    "ratio",
    "full",
    "factors",
)
LONG = 60.0  # seconds from which on one run is enough

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        measure(arguments)
        return
    print(f"{arguments.experts} experts, {arguments.side} x {arguments.side}, rank {arguments.rank}, ", end="")
    print(f"{arguments.threads} threads, torch {torch.__version__}\n\n| {' | '.join(HEAD)} |")
    print(f"|---|{'--:|' * (len(HEAD) - 1)}", flush=True)
    for rule in arguments.rules:
        print(row(rule, arguments), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rules", default=list(RULES), type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--side", default=4096, type=int)
    parser.add_argument("--rank", default=16, type=int)
    parser.add_argument("--experts", default=8, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--check", action="store_true", help="compare both results with full task vectors in float64")
    parser.add_argument("--child", nargs=2, metavar=("FORM", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [rule for rule in arguments.rules if rule not in METHODS]
    if unknown:
        parser.error(f"no rule {', '.join(unknown)}")
    return arguments


def row(rule: str, arguments: argparse.Namespace) -> str:
    """The line of one rule."""
    with tempfile.TemporaryDirectory() as folder:
        files = {form: Path(folder) / f"{i}.npy" for i, form in enumerate([*FORMS, "reference"])}
        found = {form: in_process(rule, form, files[form], arguments) for form in FORMS}
        errors = ["", ""]
        if arguments.check:
            in_process(rule, "reference", files["reference"], arguments)
            errors = [f"{distance(files[form], files['reference']):.1e}" for form in ("full", "and M")]
    seconds, megabytes = ([found[form][key] for form in FORMS] for key in ("seconds", "megabytes"))
    numbers = [f"{s:.3g}" for s in seconds] + [f"{seconds[0] / seconds[1]:.3g}"]
    numbers += [f"{m:.0f}" for m in megabytes] + [f"{megabytes[0] / max(megabytes[1], 0.1):.3g}"]
    return f"| {' | '.join([rule, *numbers, *errors])} |"


def in_process(rule: str, form: str, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a child measured; its merged update is in the file."""
    words = [f"--{name}={getattr(arguments, name)}" for name in ("side", "rank", "experts", "threads", "repeats")]
    count = str(arguments.threads)
    done = subprocess.run(
        [sys.executable, __file__, f"--rules={rule}", *words, "--child", form, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def measure(arguments: argparse.Namespace) -> None:
    """The child's half: time one form of one rule, save its update, print a line of JSON."""
    torch.set_num_threads(arguments.threads)
    (rule,), (form, file) = arguments.rules, arguments.child
    merged(draw(arguments.side // 16, min(arguments.rank, 2), arguments.experts), rule, form)
    factors = draw(arguments.side, arguments.rank, arguments.experts)
    before = reset_peak()
    seconds = [once(factors, rule, form)]
    megabytes = (memory("VmHWM") - before) / 1e6
    while seconds[0] < LONG and len(seconds) < arguments.repeats and form != "reference":
        seconds.append(once(factors, rule, form))
    if form != "factors":
        np.save(file, merged(factors, rule, form).numpy())
    print(json.dumps({"seconds": min(seconds), "megabytes": megabytes}))


def once(factors: Factors, rule: str, form: str) -> float:
    started = time.perf_counter()
    merged(factors, rule, form)
    return time.perf_counter() - started


def merged(factors: Factors, rule: str, form: str) -> Any:
    """The merged update, of `factors` the factors of it."""
    if form in ("full", "reference"):
        dtype = torch.float32 if form == "full" else torch.float64
        return acemerge.merge_deltas(full_task_vectors(factors, dtype), rule).delta
    found = acemerge.merge_factors(factors, rule)
    return found.delta() if form == "and M" else found


def full_task_vectors(factors: Factors, dtype: torch.dtype) -> torch.Tensor:
    """(T, out, in), no more of them than are asked for."""
    D = torch.empty(len(factors), len(factors[0][0]), factors[0][1].shape[1], dtype=dtype)
    for update, (U, V) in zip(D, factors, strict=True):
        torch.mm(U.to(dtype), V.to(dtype), out=update)
    return D


def draw(side: int, rank: int, experts: int) -> Factors:
    """Updates of a fine-tune's size: entries of about 0.001."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((side, rank), (rank, side))
    pairs = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(experts)]
    return [(0.001 * U, V / rank**0.5) for U, V in pairs]


def distance(file: Path, reference: Path) -> float:
    found, expected = np.load(file), np.load(reference)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
