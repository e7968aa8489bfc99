"""Time `ace` on a GPU over all layers of a model, in CUDA events, with the peak of allocated memory.

    .venv/bin/python benchmarks/gpu.py [--models vit-l,gpt2] [--rule ace]

Needs a CUDA device and a torch build for it. The task vectors of a layer are made on the GPU before its time
begins; layers follow one another as in a merge, and the peak is that of the largest of them, task vectors included.
"""

from __future__ import annotations

import argparse

import torch
from shapes import chosen_models, task_vectors

import acemerge


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="vit-l,gpt2")
    parser.add_argument("--rule", default="ace")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | experts | s | peak GB |\n|---|--:|--:|--:|")
    for model in chosen_models(arguments.models.split(",")).values():
        seconds, peak = 0.0, 0
        for layer in model.layers:
            D = task_vectors(model.experts, layer.rows, layer.columns, False).cuda()
            acemerge.merge_deltas(D, arguments.rule)  # libraries loaded, kernels chosen
            torch.cuda.reset_peak_memory_stats()
            seconds += layer.count * one_run(D, arguments.rule)
            peak = max(peak, torch.cuda.max_memory_allocated())
        print(f"| {model.title} | {model.experts} | {seconds:.2f} | {peak / 1e9:.2f} |", flush=True)


def one_run(D: torch.Tensor, rule: str) -> float:
    """Seconds between two events around one merge."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    acemerge.merge_deltas(D, rule)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
