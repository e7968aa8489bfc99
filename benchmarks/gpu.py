"""Time whole layers of models on an accelerator, in its own events, with the peak of allocated memory.

    .venv/bin/python benchmarks/gpu.py [--models vit-l,gpt2,llama-8b] [--rules ace,auto] [--tests] [--device cpu]

One script for a machine that is there for some minutes: with `--tests` every rule is first compared with the CPU
(tests/methods/test_cuda.py). The task vectors of a layer are made before its time begins; layers follow one another as
in a merge, and the peak is that of the largest of them, task vectors included. No layer is begun when `--minutes` are
over: what is missing then is said. `--device cpu --models tiny` tries the script where there is no accelerator.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import Model, chosen_models, task_vectors

import acemerge
from acemerge.engine.devices import find_devices
from acemerge.linalg.device import device_name

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="vit-l,gpt2,llama-8b")
    parser.add_argument("--rules", default="ace,auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tests", action="store_true")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    device = find_devices(arguments.device)[0]
    if device.type == "cpu" and arguments.device == "auto":
        raise SystemExit("no accelerator; --device cpu tries the script without one")
    models = chosen_models(arguments.models.split(",")).values()
    if arguments.tests:
        run_tests(until)
    name = "CPU" if device.type == "cpu" else device_name(device)
    print(f"{name}, torch {torch.__version__}\n\n| model | experts | rule | s | peak GB |\n|---|--:|---|--:|--:|")
    for model in models:
        for rule in arguments.rules.split(","):
            print(row(model, rule, device, until), flush=True)


def run_tests(until: float) -> None:
    """Every rule on CUDA beside the CPU, in half of the time at most."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_cuda.py"]
    try:
        subprocess.run(command, cwd=ROOT, check=False, timeout=(until - time.monotonic()) / 2)
    except subprocess.TimeoutExpired:
        print("tests: not all were run in time")


def row(model: Model, rule: str, device: torch.device, until: float) -> str:
    seconds, peak = 0.0, 0
    for layer in model.layers:
        if time.monotonic() > until:
            return f"| {model.title} | {model.experts} | {rule} | out of time | |"
        D = task_vectors(model.experts, layer.rows, layer.columns, False).to(device)
        work = lambda D=D: acemerge.merge_deltas(D, rule)  # noqa: E731
        work()  # libraries loaded, kernels chosen
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        seconds += layer.count * timed(work, device)
        if device.type != "cpu":
            peak = max(peak, torch.accelerator.max_memory_allocated(device))
    memory = f"{peak / 1e9:.2f}" if peak else ""
    return f"| {model.title} | {model.experts} | {rule} | {seconds:.2f} | {memory} |"


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one merge, between two events where the device has such."""
    if device.type == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize(device)
    start.record()
    work()
    end.record()
    torch.accelerator.synchronize(device)
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
