"""How far scores would differ on other held-out examples, by the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Hits = Mapping[str, Tensor]  # of each task, (examples,): whether each was labelled rightly
_DRAWS = 2000


def shares(hits: Hits, experts: Hits) -> Tensor:
    """Mean over the tasks of accuracy / the expert's own, for 2,000 draws with replacement from each task's examples.

    The same draws for the model and the expert, and in every call.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(_DRAWS, dtype=torch.float64)
    for task, right in hits.items():
        drawn = torch.randint(len(right), (_DRAWS, len(right)), generator=generator)
        found += right.double()[drawn].mean(1) / experts[task].double()[drawn].mean(1)
    return found / len(hits)


def interval(draws: Tensor) -> tuple[float, float]:
    """Where 95 % of the draws lie."""
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high
