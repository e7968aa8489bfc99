"""Time `ace` against the formula as it is printed: every Gram matrix formed, a general inverse, a full SVD.

    .venv/bin/python benchmarks/ace_against_naive.py [--quick]

Both run in one process on the same threads in float32, alternately, and the best of the repeats counts. The
task vectors are random: a low-rank part that carries the task and noise, energies equal or spread twentyfold.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import acemerge

# experts, out, in
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
    quick = parser.parse_args().quick
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| layer | experts x out x in | branch | naive, s | ace, s | ratio | status |\n|---|---|---|--:|--:|--:|---|")
    ratios = []
    for layer, shape in SHAPES.items():
        if quick and math.prod(shape) > 2e7:
            continue
        for hetero in (False, True):
            D = task_vectors(*shape, hetero)
            tau = -1.0 if hetero else 1e9
            status = acemerge.merge_deltas(D, "ace", tau=tau).stats["status"]
            times = [(seconds(naive, D, hetero), seconds(acemerge.merge_deltas, D, "ace", tau=tau)) for _ in range(3)]
            slow, fast = (min(column) for column in zip(*times, strict=True))
            ratios.append(slow / fast)
            branch = "heterogeneous" if hetero else "homogeneous"
            size = " x ".join(map(str, shape))
            print(
                f"| {layer} | {size} | {branch} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {status} |", flush=True
            )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of the ratios {mean:.2f}, smallest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
