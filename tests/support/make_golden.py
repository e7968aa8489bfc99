"""What the files in tests/methods/golden hold: their inputs, and what the slow oracles make of these in float64.

As a script it writes the results anew, `python tests/support/make_golden.py`. The inputs are data: they stay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "methods" / "golden"


def gamma(deltas: Tensor) -> Tensor:
    """ACE's measure of heterogeneity, `var(log n_t) / mean(log n_t)^2`."""
    logs = torch.log(deltas.square().sum((1, 2)) + 1e-12)
    return logs.var() / (logs.mean().square() + 1e-12)


RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma": gamma,
    "ace": oracles.ace,
    "actmat": oracles.actmat,
    "tact": lambda D: oracles.actmat(D, keep=0.5),
    "average": oracles.average,
    "task_arithmetic": oracles.task_arithmetic,
    "tsv_m": oracles.tsv_m,
    "iso_c": oracles.iso_c,
    "iso_cts": oracles.iso_cts,
    "cart": oracles.cart,
    "wudi": oracles.wudi,
    "swudi_a": oracles.swudi_a,
    "anchored": oracles.anchored,
    "kron": oracles.kron,
    "ace__eps=0.01": lambda D: oracles.ace(D, eps=1e-2),
    "ace__eps=0.0002": lambda D: oracles.ace(D, eps=2e-4),
}


def contents(file: Path) -> dict[str, Tensor]:
    """All that belongs into a file, from its inputs."""
    deltas = torch.from_numpy(np.load(file)["deltas"])
    return {"deltas": deltas, **{key: make(deltas) for key, make in RESULTS.items()}}


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.npz")):
        np.savez(path, **{key: value.numpy() for key, value in contents(path).items()})
