"""Time `ace` against the formula as it is printed: every Gram matrix formed, a general inverse, a full SVD.

    .venv/bin/python benchmarks/ace_against_naive.py [--quick] [--errors]

Both run in one process on the same threads in float32, alternately, and the best of the repeats counts. The
task vectors are random: a low-rank part that carries the task and noise, energies equal or spread twentyfold.
`--errors` times nothing: it compares float32 with float64.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import acemerge

Case = tuple[str, tuple[int, int, int], bool]  # layer, (experts, out, in), heterogeneous

SHAPES = {
    "ViT-B attention": (8, 768, 768),
    "ViT-B MLP up": (8, 3072, 768),
    "ViT-B MLP down": (8, 768, 3072),
    "ViT-L attention": (8, 1024, 1024),
    "ViT-L MLP up": (8, 4096, 1024),
    "ViT-L MLP down": (8, 1024, 4096),
    "GPT-2 attention, as stored": (7, 768, 2304),
    "Llama-3.2-3B MLP down, two experts": (2, 3072, 8192),
}


def naive(D: Tensor, hetero: bool, eps: float = 1e-5, k_frac: float = 0.3) -> Tensor:
    T, rows, columns = D.shape
    n = torch.stack([(d**2).sum() for d in D])
    C = [d - d.mean(0, keepdim=True) for d in D]
    S = [c.T @ c for c in C]
    eye = torch.eye(columns)
    if hetero:
        z = [s.trace() for s in S]
        S = [s / t for s, t in zip(S, z, strict=True)]
        R = [s + eps / t * eye for s, t in zip(S, z, strict=True)]
    else:
        R = [s + eps * eye for s in S]
    c = torch.stack(S).sum(0).sum(0) / columns / (n.mean() if hetero else 1)
    total = torch.stack(R).sum(0)
    pre = torch.stack([a @ b for a, b in zip(C, R, strict=True)]).sum(0) @ torch.linalg.inv(total + c)
    if not hetero:
        return pre
    res = torch.stack([d @ (s - total / T) for d, s in zip(D, S, strict=True)]).sum(0)
    U, s, Vh = torch.linalg.svd(res + pre, full_matrices=False)
    k = int(min(rows, columns) * k_frac)
    return pre + s[:k].mean() * U[:, :k] @ Vh[:k]


def task_vectors(T: int, rows: int, columns: int, hetero: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns) // 8
    parts = []
    for size in torch.logspace(0, 1.3 if hetero else 0.05, T) * 0.02:
        task = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        noise = 0.3 * torch.randn(rows, columns, generator=generator)
        parts.append(size * (task / rank**0.5 + noise) / max(rows, columns) ** 0.5)
    return torch.stack(parts)


def seconds(run: Callable[..., object], *args: object, **options: object) -> float:
    started = time.perf_counter()
    run(*args, **options)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="leave out the largest layers")
    parser.add_argument("--errors", action="store_true", help="distance of float32 from float64, no times")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = [
        (layer, shape, hetero)
        for layer, shape in SHAPES.items()
        for hetero in (False, True)
        if not (arguments.quick and math.prod(shape) > 2e7)
    ]
    if arguments.errors:
        print_errors(cases)
    else:
        print_times(cases)


def print_errors(cases: list[Case]) -> None:
    print("| layer | experts x out x in | branch | relative error | status |\n|---|---|---|--:|---|")
    for layer, shape, hetero in cases:
        D, tau = task_vectors(*shape, hetero), -1.0 if hetero else 1e9
        single = acemerge.merge_deltas(D, "ace", tau=tau)
        double = acemerge.merge_deltas(D, "ace", tau=tau, compute_dtype=torch.float64).delta
        error = float((single.delta.double() - double).norm() / double.norm())
        print(f"| {describe(layer, shape, hetero)} | {error:.1e} | {single.stats['status']} |", flush=True)


def describe(layer: str, shape: tuple[int, int, int], hetero: bool) -> str:
    return f"{layer} | {' x '.join(map(str, shape))} | {'heterogeneous' if hetero else 'homogeneous'}"


def print_times(cases: list[Case]) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| layer | experts x out x in | branch | naive, s | ace, s | ratio | status |\n|---|---|---|--:|--:|--:|---|")
    ratios = []
    for layer, shape, hetero in cases:
        D, tau = task_vectors(*shape, hetero), -1.0 if hetero else 1e9
        status = acemerge.merge_deltas(D, "ace", tau=tau).stats["status"]
        times = [(seconds(naive, D, hetero), seconds(acemerge.merge_deltas, D, "ace", tau=tau)) for _ in range(3)]
        slow, fast = (min(column) for column in zip(*times, strict=True))
        ratios.append(slow / fast)
        numbers = f"{slow:.2f} | {fast:.2f} | {slow / fast:.2f}"
        print(f"| {describe(layer, shape, hetero)} | {numbers} | {status} |", flush=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of the ratios {mean:.2f}, smallest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
