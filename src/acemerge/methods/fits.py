"""Rules that are one least-squares fit: alone, or many small layers together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, runtime_checkable

import torch

from acemerge.linalg.least_squares import Fit, Problem, least_squares_trusted
from acemerge.linalg.stacked import least_squares_together
from acemerge.methods.base import Layer, LayerResult, Method
from acemerge.shapes import Float, Tensor

# A rule for one layer: it asks for a fit, gets it with its status, and returns the result. It may return before.
Fitting = Generator[Problem, tuple[Fit, str], LayerResult]


@runtime_checkable
class Fits(Protocol):
    """A rule that is one fit."""

    def fitting(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> Fitting: ...


def source_of(method: Method, D: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
    """The Z (out, in) whose `Z^T Z` the rule takes for the second moment of an expert's inputs, up to a factor.

    None for a rule that is no fit, and for an expert without an update.
    """
    if not isinstance(method, Fits):
        return None
    alone = Layer(torch.ones(1, dtype=torch.float64, device=D.device), (0,))
    asked = _asked(method.fitting(D[None], alone))
    return asked.sources(0, D.dtype) if isinstance(asked, Problem) else None


def fitted(fitting: Fitting, deltas: Float[Tensor, "T out in"]) -> LayerResult:
    """One layer, in the type of its task vectors or, where that is not accurate enough, float64."""
    asked = _asked(fitting)
    if isinstance(asked, LayerResult):
        return asked
    return _answered(fitting, least_squares_trusted(asked, deltas.dtype, deltas.device))


def fitted_together(fittings: Sequence[Fitting], device: torch.device) -> list[LayerResult]:
    """Small layers, in float64: those of one shape in as many calls as one takes."""
    asked = [_asked(fitting) for fitting in fittings]
    fits = iter(least_squares_together([problem for problem in asked if isinstance(problem, Problem)], device))
    return [
        _answered(fitting, next(fits)) if isinstance(problem, Problem) else problem
        for fitting, problem in zip(fittings, asked, strict=True)
    ]


def _asked(fitting: Fitting) -> Problem | LayerResult:
    """What it asks for, or its result where it needs no fit."""
    try:
        return next(fitting)
    except StopIteration as end:
        result: LayerResult = end.value
        return result


def _answered(fitting: Fitting, fit: tuple[Fit, str]) -> LayerResult:
    try:
        fitting.send(fit)
    except StopIteration as end:
        result: LayerResult = end.value
        return result
    raise AssertionError("a rule asks for one fit")
