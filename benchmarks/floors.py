"""What a rule cannot do without on one layer: general products, symmetric ones, eigen-decompositions.

Each is counted at its own measured speed: what a machine makes of a symmetric product is not half of a general one's
time, and an eigen-decomposition is no product at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Case

from acemerge.linalg.gram import symmetric_product
from acemerge.methods import make
from acemerge.methods.both_sides import kept_directions

_SIDE = 2048  # of the symmetric product that is measured


@dataclass(frozen=True)
class Floor:
    """Operations in general products and solves, and in symmetric products at half price; eigen-decompositions of a
    matrix with this side.
    """

    general: int
    symmetric: int = 0
    decompositions: int = 0
    side: int = 0

    def rates(self) -> dict[str, float]:
        """GFLOP/s of a symmetric product, and seconds of one eigen-decomposition by LAPACK in float32."""
        x = torch.randn(_SIDE, _SIDE)
        found = {"symmetric_gflops": _SIDE**3 / _best(lambda: symmetric_product(x)) / 1e9, "eigh": 0.0}
        if self.decompositions:
            x = torch.randn(2 * self.side, self.side)
            gram = symmetric_product(x)
            found["eigh"] = _best(lambda: torch.linalg.eigh(gram))
        return found


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def floor_of(case: Case) -> Floor:
    """Rules that are not told apart here count all of their operations as general ones."""
    T, m, n = case.experts, case.rows, case.columns
    short = min(m, n)
    if case.rule == "ace":
        if T * m < n:  # in the space of all rows
            general, symmetric = 2 * m * T * m * (T * m + n) + (T * m) ** 3 // 3, (T * m) ** 2 * n
        else:
            general = (2 * T * m * m * n if m < n else 2 * (T - 1) * m * n * n) + n**3 // 3 + 2 * m * n * n
            symmetric = T * m * n * n + (T * m * m * n if m < n else 0)
        if not case.hetero:
            return Floor(general, symmetric)
        k = int(0.3 * short)  # the residual's product; a Gram matrix; X V_k, and that with V_k^T
        return Floor(general + 2 * m * n * n + 4 * m * n * k, symmetric + m * n * short, 1, short)
    method = make(case.rule, case.params)
    operations = int(method.operations(T, m, n))
    if case.rule in ("kron", "kron_auto"):  # which counts a decomposition as 9 n^3
        long, k = max(m, n), kept_directions(method.keep, short)  # type: ignore[attr-defined]
        symmetric = T * long * short**2
        for size in (long, short):
            formed, factored = sorted((size, T * min(short, k)), reverse=True)
            symmetric += formed * factored**2
        return Floor(operations - 9 * T * short**3 - symmetric, symmetric, T, short)
    return Floor(operations)
