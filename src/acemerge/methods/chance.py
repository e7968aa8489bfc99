"""Random numbers that depend on nothing but an expert's seed: not on order, workers or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from acemerge.shapes import Float, Tensor


class Chance:
    """One stream of uniform numbers per expert, drawn on the CPU whatever the device."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform_like(self, x: Float[Tensor, "*shape"], expert: int) -> Float[Tensor, "*shape"]:
        """The next numbers of an expert's stream, in [0, 1), one for each entry of x."""
        return torch.rand(x.shape, generator=self._generators[expert]).to(x.device)
