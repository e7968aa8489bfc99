"""A wrapper that fits a rule of least squares again and again, each expert weighted by how little it is disturbed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from acemerge.errors import UsageError
from acemerge.linalg.gram import energies
from acemerge.linalg.least_squares import Fit, least_squares_trusted
from acemerge.linalg.problem import Problem
from acemerge.linalg.select import largest_entry
from acemerge.methods.around import Over, accepted_by, inner_rule
from acemerge.methods.base import Layer, LayerResult, Method, Needs, Scale, Work
from acemerge.methods.least_squares_rule import LeastSquaresRule, with_fit
from acemerge.methods.status import Status
from acemerge.shapes import Float, Tensor

_USUAL = 8  # fits to the default stop


def _inner(over: str | Mapping[str, Any]) -> LeastSquaresRule[Any]:
    rule = inner_rule(over)
    if not isinstance(rule, LeastSquaresRule):
        cure = "take actmat, tact, anchored, ace_auto or ace"
        raise UsageError("over", f"{rule.name} is no single fit by least squares", cure)
    return rule


@dataclass(frozen=True)
class RefitWork:
    """What the other rule's fit takes, of the transposes where `turned`, and three tensors of the layer's size."""

    inner: Work
    turned: bool

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        sides = (columns, rows) if self.turned else (rows, columns)
        return self.inner.entries(experts, *sides, threads) + 3 * rows * columns


@dataclass(frozen=True)
class Cauchy:
    """Product of Cauchy experts: a fit by least squares in which an expert that is far from it counts less.

        M = the fit of the rule inside, whose terms are a_t ||(M - X_t) Z_t^T||_F^2, at first all a_t = 1;  then
        a_t = 1 / (||(M - X_t) Z_t^T||_F^2 + tol ||Z_t||_F^2 e),  e = mean_s ||X_s Z_s^T||_F^2 / ||Z_s||_F^2
        and the fit with these, until ||change||_F <= stop ||M||_F, or for `steps` fits

    of targets X_t and sources Z_t of the rule inside, for actmat both D_t. It is the descent, by iteratively reweighted
    least squares, of `sum_t log(||(M - X_t) Z_t^T||_F^2 + tol ||Z_t||_F^2 e)`. Source: Bui et al. 2026 (arXiv
    2607.01689) and its code, MinhLong210/PoE-EBM-Merging, which are this over actmat with side `output`.
    Departures: theirs are absolute where these are relative, so that scaling all updates scales M. Their tol (0.3 for
    full fine-tunes, 1e-5 for adapters) has no e; their ridge, jitter, is 1e-3 where ours is that share of the mean
    diagonal of the system, beside the rule's own; they stop at a change of 1e-5. a_t are scaled so that the trace of
    the system stays, and with it what a ridge, pull or prior of the rule inside weighs. Weights wider than long are cut
    into squares there, and bias columns join them. The input side is the default here, as for actmat.
    With side `output` the transposes are merged, and full updates of adapters are formed. An expert's weight multiplies
    its term, and may not be negative. `steps` is how many fits it took, `last_step` the last change, as a share.
    """

    name: ClassVar[str] = "cauchy"
    source: ClassVar[str] = "arXiv 2607.01689"

    over: Annotated[Over, accepted_by(_inner)] = "actmat"
    tol: Annotated[float, Field(gt=0, allow_inf_nan=False, description="width of the Cauchy distributions")] = 0.3
    jitter: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="ridge, as a share of the system's mean diagonal")
    ] = 1e-3
    side: Annotated[Literal["input", "output"], Field(description="whose second moments the updates give")] = "input"
    steps: Annotated[int, Field(ge=0, le=100_000, description="fits after the first, at most")] = 50
    stop: Annotated[float, Field(gt=0, lt=1, description="change to stop at, as a share of M")] = 1e-5
    scale: Scale = 1.0

    @cached_property
    def inner(self) -> LeastSquaresRule[Any]:
        """The rule whose fit it is."""
        return _inner(self.over)

    @property
    def needs(self) -> Needs:
        inner: Needs = self._method.needs
        turned = self.side == "output"
        asked = replace(inner, work=RefitWork(inner.work, turned))
        return replace(asked, factors="full", input_side=False) if turned else asked

    @property
    def _method(self) -> Method:
        inner: Any = self.inner
        method: Method = inner
        return method

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        turned = self.side == "output"
        asked = self.inner.to_fit(deltas.mT.contiguous() if turned else deltas, layer)
        if isinstance(asked, LayerResult):
            delta = asked.delta.T if turned else asked.delta
            return replace(asked, delta=self.scale * delta)
        problem, kept = asked
        of_layer = layer.sides(deltas)[
            0 if turned else 1
        ]  # the mean diagonal is the layer's, of which a core lacks zeros
        ridge = problem.relative_ridge + self.jitter * problem.shape[1] / of_layer
        found = _reweighted(replace(problem, relative_ridge=ridge), self, deltas.dtype, deltas.device)
        M, own = self.inner.from_fit(found.fit, kept)
        stats = with_fit(replace(own, steps=found.steps, last_step=found.change), found.fit)
        if found.change > self.stop:
            before = tuple(status for status in stats.statuses if status is not Status.OK)
            stats = replace(stats, statuses=(*before, Status.NOT_CONVERGED))
        M = M.mul_(self.scale).to(deltas.dtype)
        return LayerResult(M.T if turned else M, stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With the fits that it usually takes."""
        sides = (rows, columns) if self.side == "input" else (columns, rows)
        residuals = 2 * experts * rows * columns * sides[0]
        return min(self.steps + 1, _USUAL) * (self._method.operations(experts, *sides) + residuals)


@dataclass(frozen=True)
class _Reweighted:
    """The last fit, after so many others, and how far it is from the one before as a share of M."""

    fit: Fit
    steps: int
    change: float


def _reweighted(problem: Problem, rule: Cauchy, dtype: torch.dtype, device: torch.device) -> _Reweighted:
    fit, steps, change = least_squares_trusted(problem, dtype, device), 0, 0.0
    sizes = _sizes(problem, dtype)
    nothing = torch.zeros((), dtype=dtype, device=device)
    unit = sum(_disturbance(problem, t, nothing) / n for t, n in sizes.items()) / max(1, len(sizes))  # e
    of_tol = max(1.0, rule.tol)  # by which all a_t are smaller than they say: they count beside one another only
    while len(sizes) > 1 and steps < rule.steps:
        a = {t: 1 / (_disturbance(problem, t, fit.M) / of_tol + rule.tol / of_tol * n * unit) for t, n in sizes.items()}
        after = least_squares_trusted(_weighed(problem, a, sizes), dtype, device)
        M = after.M.double()
        change = float((M - fit.M).norm()) / (float(M.norm()) or 1.0)
        fit, steps = after, steps + 1
        if change <= rule.stop:
            break
    return _Reweighted(fit, steps, change)


def _disturbance(problem: Problem, t: int, M: Float[Tensor, "*matrix"]) -> float:
    """`||(M - X_t) Z_t^T||_F^2`."""
    Z = problem.sources(t, M.dtype)
    R = M - problem.targets(t, M.dtype)
    sizes = largest_entry(R), largest_entry(Z)
    if not all(sizes):
        return 0.0
    size, turned = sizes[0] * sizes[1], (Z / sizes[1]).T  # products of very small or large entries would leave float32
    # By as many rows as there are columns: all of (out, out) may be many times a layer.
    total = sum(float(energies(((rows / sizes[0]) @ turned)[None])) for rows in R.split(R.shape[1]))
    return total * size * size  # infinite, not an error, where it is beyond float64


def _sizes(problem: Problem, dtype: torch.dtype) -> dict[int, float]:
    """`||Z_t||_F^2` of the experts that have a weight and a second moment."""
    sizes = {t: float(energies(problem.sources(t, dtype)[None])) for t, w in enumerate(problem.weights) if w}
    return {t: size for t, size in sizes.items() if size}


def _weighed(problem: Problem, a: Mapping[int, float], sizes: Mapping[int, float]) -> Problem:
    """The problem with a_t on the terms, scaled so that `sum_t w_t ||Z_t||^2` stays."""
    total = sum(problem.weights[t] * size for t, size in sizes.items())
    weighed = sum(problem.weights[t] * a[t] * size for t, size in sizes.items())
    return replace(problem, weights=[w * a.get(t, 0.0) * total / weighed for t, w in enumerate(problem.weights)])
