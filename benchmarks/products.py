"""What a product of matrices costs here: the rates behind the choices in linalg.

    .venv/bin/python benchmarks/products.py

GFLOP/s of a product of the size, the best of several: in float32; in bfloat16, result included; of float32 operands
cut to bfloat16, summed in float32; and of three such, of the operands' upper and lower halves, which together are
nearly float32 (`error` is relative, and that of float32 itself beside it). Then milliseconds of a symmetric product, of
a solve with a Cholesky factor, and of eigen-decompositions, by the names that they have in torch or in linalg.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from acemerge.linalg.gram import symmetric_product
from acemerge.linalg.solve import solve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", default="768,1024,2048,4096")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)  # only there on x86
    print(f"torch {torch.__version__}, {arguments.threads} threads, AMX: {amx}\n")
    print("| GFLOP/s | float32 | bfloat16 | cut to bfloat16 | three of halves | error | of float32 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for n in sizes:
        print(rates(n), flush=True)
    print("\n| ms | product | x^T x | solve | eigh | eigh float64 | eigvalsh |\n|---|--:|--:|--:|--:|--:|--:|")
    for n in sizes:
        if n <= 1024:
            print(times(n), flush=True)


def rates(n: int) -> str:
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    short_a, short_b, out = a.bfloat16(), b.bfloat16(), torch.empty(n, n)
    taken = [
        best(lambda: torch.mm(a, b, out=out)),
        best(lambda: short_a @ short_b),
        best(lambda: cut(a, b, out)),
        best(lambda: by_halves(a, b)),
    ]
    exact = a.double() @ b.double()
    errors = [float((found - exact).norm() / exact.norm()) for found in (by_halves(a, b), a @ b)]
    cells = [*(f"{2 * n**3 / seconds / 1e9:.0f}" for seconds in taken), *(f"{error:.1e}" for error in errors)]
    return f"| {n} | {' | '.join(cells)} |"


def cut(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a b` of operands rounded to bfloat16, summed in float32."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    try:
        return torch.mm(a, b, out=out)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


def by_halves(a: Tensor, b: Tensor) -> Tensor:
    upper_a, upper_b = a.bfloat16().float(), b.bfloat16().float()
    lower_a, lower_b = a - upper_a, b - upper_b
    total = torch.zeros(len(a), b.shape[1])
    for x, y in ((upper_a, upper_b), (upper_a, lower_b), (lower_a, upper_b)):
        total += cut(x, y, torch.empty_like(total))
    return total


def times(n: int) -> str:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    gram = symmetric_product(x)
    L = torch.linalg.cholesky(gram + n * torch.eye(n))
    taken = [
        best(lambda: x @ x),
        best(lambda: symmetric_product(x)),
        best(lambda: solve(L, x)),
        best(lambda: torch.linalg.eigh(gram)),
        best(lambda: torch.linalg.eigh(gram.double())),
        best(lambda: torch.linalg.eigvalsh(gram)),
    ]
    return f"| {n} | {' | '.join(f'{1000 * seconds:.1f}' for seconds in taken)} |"


def best(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


if __name__ == "__main__":
    main()
