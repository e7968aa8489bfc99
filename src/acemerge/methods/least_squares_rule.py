"""Rules that are one least-squares fit: what they have fitted, and what they make of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar, final

import torch

from acemerge.linalg.least_squares import Fit, least_squares_trusted
from acemerge.linalg.problem import Problem
from acemerge.linalg.stacked import least_squares_together
from acemerge.methods.base import Layer, LayerResult, Method
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_BY = {"itself": Status.OK, "refinement": Status.REFINED, "float64": Status.FLOAT64}
Kept = TypeVar("Kept")  # what a rule needs again of a layer once the fit is there


class LeastSquaresRule(ABC, Generic[Kept]):
    """A rule that is one fit: it says what is to be fitted, and what is made of the fit.

    Layers alone, and many small ones together, are merged from these two.
    """

    scale: float

    @abstractmethod
    def to_fit(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> tuple[Problem, Kept] | LayerResult:
        """The problem, with what `from_fit` is to be given; the result itself where nothing is to be fitted."""

    @abstractmethod
    def from_fit(self, fit: Fit, kept: Kept) -> tuple[Float[Tensor, "out in"], LayerStats]:
        """M in the type of the fit, whose own M may be used up, and the rule's own numbers.

        Status, condition and rank are added to these.
        """

    @final
    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        """In the type of the task vectors or, where that is not accurate enough, float64."""
        asked = self.to_fit(deltas, layer)
        if isinstance(asked, LayerResult):
            return asked
        problem, kept = asked
        return self._result(least_squares_trusted(problem, deltas.dtype, deltas.device), kept, deltas.dtype)

    @final
    def merge_together(self, stack: Float[Tensor, "P T out in"], layers: Sequence[Layer]) -> list[LayerResult]:
        """Small layers, in float64: those of one shape in as many calls as one takes."""
        asked = [self.to_fit(deltas, layer) for deltas, layer in zip(stack, layers, strict=True)]
        problems = [one[0] for one in asked if not isinstance(one, LayerResult)]
        fits = iter(least_squares_together(problems, stack.device))
        return [one if isinstance(one, LayerResult) else self._result(next(fits), one[1], stack.dtype) for one in asked]

    def _result(self, fit: Fit, kept: Kept, dtype: torch.dtype) -> LayerResult:
        M, own = self.from_fit(fit, kept)
        return LayerResult(M.mul_(self.scale).to(dtype), with_fit(own, fit))


def with_fit(stats: LayerStats, fit: Fit) -> LayerStats:
    """A rule's numbers with what its fit says of itself: status, condition and rank."""
    known = fit.diagnosis
    status = _BY[fit.by] if known.regular else Status.PSEUDO_INVERSE
    return replace(stats, statuses=(status,), condition=known.condition, rank=known.rank)


def source_of(method: Method, D: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
    """The Z (out, in) whose `Z^T Z` the rule takes for the second moment of an expert's inputs, up to a factor.

    None for a rule that is no fit, and for an expert without an update.
    """
    if not isinstance(method, LeastSquaresRule):
        return None
    asked = method.to_fit(D[None], Layer(torch.ones(1, dtype=torch.float64, device=D.device), (0,)))
    return None if isinstance(asked, LayerResult) else asked[0].sources(0, D.dtype)
