"""How far a merge may move the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot, sqrt
from typing import Annotated, Any, ClassVar

from pydantic import Field

from acemerge.errors import UsageError
from acemerge.linalg.gram import energies
from acemerge.methods.around import Over, accepted_by, inner_rule
from acemerge.methods.base import Layer, LayerResult, Method, Needs, Scale
from acemerge.shapes import Float, Tensor

STEP = 0.25  # docs/which-rule.md has how it was found

Step = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="how far weights may move, beside the weights themselves")
]


@dataclass(frozen=True)
class Disturbance:
    """How far apart the experts of a layer are, and how large its weights.

        p_t = w_t n_t / sum_s w_s n_s,  D = sum_t p_t D_t,  n_t = ||D_t||_F^2, w_t the experts' weights
        q = 1 - ||D||_F^2 / sum_t p_t n_t
        w^2 = ||W_0||_F^2 + sum_t w_t n_t / sum_t w_t

    `dissent` is q: 0 where all want the same or one has all the energy, `1 - 1 / T` for T alike at right angles.
    `size` is w^2, about the mean energy of the experts' own weights, so that it is above zero where W_0 is not.
    """

    dissent: float
    size: float

    def moved(self, energy: float) -> float:
        """`q ||X||_F^2 / w^2`, from `energy`, the `||X||_F^2` of an update."""
        return self.dissent * energy / self.size if self.size else 0.0

    def step(self, energy: float) -> float:
        """`||X||_F / w`, alike."""
        return (energy / self.size) ** 0.5 if self.size else 0.0


def disturbance(
    experts: Iterable[Tensor], weights: Sequence[float], n: Sequence[float], base_energy: float
) -> Disturbance:
    """Of experts whose energies are `n`, on a base with `||W_0||_F^2 = base_energy`. Signs of weights do not count."""
    shares = [abs(w) * one for w, one in zip(weights, n, strict=True)]
    total, count = sum(shares), sum(map(abs, weights))
    if not total:
        return Disturbance(0.0, base_energy)
    mean: Tensor | None = None
    for D, share in zip(experts, shares, strict=True):
        mean = D * (share / total) if mean is None else mean.add_(D, alpha=share / total)
    assert mean is not None
    among = sum(share / total * one for share, one in zip(shares, n, strict=True))
    return Disturbance(max(0.0, 1 - float(energies(mean[None])) / among), base_energy + total / count)


def shortening(moved: float, step: float) -> float:
    """`1 / (1 + m^2 / step^2)^(1/2)`: near 1 for short steps, and `step` itself in the end for long ones."""
    return 1 / hypot(1, sqrt(moved) / step)


def _inner(over: str | Mapping[str, Any]) -> Method:
    rule = inner_rule(over)
    if rule.needs.base or rule.needs.masks:
        does = "merges weights" if rule.needs.base else "makes masks of entries"
        raise UsageError("over", f"{rule.name} {does}, and an update is shortened here", "take a rule without")
    return rule


@dataclass(frozen=True)
class Trust:
    """Another rule's update, made shorter the further it moves the weights where the experts do not want the same.

        M = X / (1 + m^2 / step^2)^(1/2),  m^2 = q ||X||_F^2 / w^2
        q = 1 - ||sum_t p_t D_t||_F^2 / sum_t p_t n_t,  p_t = w_t n_t / sum_s w_s n_s,  n_t = ||D_t||_F^2
        w^2 = ||W_0||_F^2 + sum_t w_t n_t / sum_t w_t

    Source: this library. X is the other rule's update, q how far apart the experts are, w^2 the energy of the layer's
    weights. A rule fits a layer to first order in the weights; what that leaves out grows with the move beside the
    weights themselves. M is at most `step w / q^(1/2)` long, in X's direction. Scaling base and updates together
    scales M. One expert alone, and experts that are equal, are not shortened. Where the base is not known, as by
    `merge_deltas` without `base`, M is X. `relative_step` is `||X||_F / w`. Weights are the other rule's, which has
    a scale of 1 and may not be one that merges weights or makes masks.
    """

    name: ClassVar[str] = "trust"
    source: ClassVar[str] = "acemerge"

    over: Annotated[Over, accepted_by(_inner)] = "tsv_m"
    step: Step = STEP
    scale: Scale = 1.0

    @cached_property
    def inner(self) -> Method:
        """The rule that merges."""
        return _inner(self.over)

    @property
    def needs(self) -> Needs:
        inner = self.inner.needs
        factors = "frame" if inner.factors == "linear" else inner.factors  # its coefficients depend on the updates
        return replace(inner, base_energy=True, entrywise=False, factors=factors)

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        found = self.inner.merge(deltas, layer)
        base_energy = layer.energy_of_base()
        if base_energy is None:
            return replace(found, delta=found.delta * self.scale)
        n, weights = energies(deltas).tolist(), layer.weights.tolist()
        known = disturbance(deltas, weights, n, base_energy)
        energy = float(energies(found.delta[None]))
        factor = shortening(known.moved(energy), self.step) * self.scale
        stats = replace(found.stats, relative_step=known.step(energy))
        return replace(found, delta=found.delta * factor, stats=stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return self.inner.operations(experts, rows, columns) + (4 * experts + 6) * rows * columns
