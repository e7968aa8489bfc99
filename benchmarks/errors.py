"""How far float32 is from float64: `ace` in both branches, or any rule, on the benchmark's layers. No times.

.venv/bin/python benchmarks/errors.py [--models vit-b,vit-l] [--rules ace,tsv_m] [--quick]
"""

from __future__ import annotations

import argparse

import torch
from rules import PAIRS, distinct_shapes
from shapes import DEFAULT, chosen_models, task_vectors

import acemerge


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=",".join(DEFAULT), help="comma-separated, see benchmarks/shapes.py")
    parser.add_argument("--rules", default="ace", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="leave out the larger layers")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    shapes = distinct_shapes(chosen_models(arguments.models.split(",")).values(), arguments.quick)
    print("| rule | layer | experts x out x in | branch | relative error | status |\n|---|---|---|---|--:|---|")
    for rule in arguments.rules.split(","):
        for shape, layers in shapes.items():
            for hetero in PAIRS[rule].branches if rule in PAIRS else (False,):
                error, status = relative_error(rule, shape, hetero)
                branch = ("heterogeneous" if hetero else "homogeneous") if rule == "ace" else ""
                size = " x ".join(map(str, shape))
                print(f"| {rule} | {layers} | {size} | {branch} | {error:.1e} | {status} |", flush=True)


def relative_error(rule: str, shape: tuple[int, int, int], hetero: bool) -> tuple[float, str]:
    """Distance of the float32 result from the float64 one, and the status of the former."""
    D = task_vectors(*shape, hetero)
    params = {"tau": -1.0 if hetero else 1e9} if rule == "ace" else {}
    single = acemerge.merge_deltas(D, rule, **params)
    double = acemerge.merge_deltas(D, rule, compute_dtype=torch.float64, **params).delta
    return float((single.delta.double() - double).norm() / double.norm()), str(single.stats["status"])


if __name__ == "__main__":
    main()
