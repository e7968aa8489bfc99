"""The one interface of a merge rule."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field

from acemerge.errors import UsageError
from acemerge.linalg.gram import energies
from acemerge.linalg.known import Known
from acemerge.linalg.lowrank import Frame
from acemerge.linalg.rounding import NULL
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.shapes import Bool, Float, Tensor

Scale = Annotated[float, Field(allow_inf_nan=False, description="factor on the merged update")]
Calibration = Literal["inputs", "merged inputs", "gradients", "both sides"]
# What a result has. A rule that is not the library's own may give a plain mapping, which becomes that.
if TYPE_CHECKING:
    Stats = LayerStats
else:
    Stats = Mapping


@dataclass(frozen=True)
class Layer:
    """What a rule may know of a layer besides its task vectors, for the T experts in their order.

    `weights` (T,) are float64 on the device of the task vectors. `seeds` start one stream of random numbers per
    expert. `thresholds` (T,) are the magnitudes that a rule with `needs.keep` trims at; None asks for this
    tensor's own. `base` is `W_0` for rules that merge weights, not updates, for which None stands for zeros, and for
    those that need its energy; where only that is known, it is `base_energy`. `frame`, for rules
    with such `needs.factors`, tells of which larger matrices the task vectors are the cores. `moments` (T, ...) are
    what was measured of each expert on data of its own, for rules with `needs.calibration`: see there for their shape.
    None where nothing of this layer was seen. `known` holds what other rules have made of these very task vectors.
    """

    weights: Float[Tensor, " T"]
    seeds: tuple[int, ...]
    thresholds: tuple[float, ...] | None = None
    base: Float[Tensor, "*shape"] | None = None
    base_energy: float | None = None
    frame: Frame | None = None
    moments: Float[Tensor, "T *moment"] | None = None
    known: Known | None = None

    def sides(self, deltas: Float[Tensor, "T out in"]) -> tuple[int, int]:
        """(out, in) of the layer, whose task vectors or their cores are `deltas`."""
        return (deltas.shape[1], deltas.shape[2]) if self.frame is None else self.frame.shape

    def energy_of_base(self) -> float | None:
        """`||W_0||_F^2`, None where nothing is known of it."""
        if self.base is None or self.base_energy is not None:
            return self.base_energy
        return float(energies(self.base[None]))

    def part(self, i: int) -> Layer:
        """The same for the i-th matrix of a stack."""
        seeds = tuple(_hash(f"{seed}/{i}") for seed in self.seeds)
        base = None if self.base is None else self.base[i]
        moments = None if self.moments is None else self.moments[:, i]
        return Layer(self.weights, seeds, self.thresholds, base, moments=moments)


@dataclass(frozen=True)
class LayerResult:
    """What a rule made of one layer.

    `delta` (out, in) is `scale * M`: the merged weight is `W_0 + delta`. `stats` are the rule's numbers and its
    statuses: OK, or what it had to fall back to; a plain mapping is read as the manifest's, and UsageError says where
    it is not. `masks` (T, out, in), where a rule makes them, say which entries of the merged update are an expert's
    own.
    """

    delta: Float[Tensor, "*shape"]
    stats: Stats
    masks: Bool[Tensor, "T *shape"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stats, LayerStats):  # of a rule that is not the library's own
            object.__setattr__(self, "stats", _stats_from(self.stats))


@runtime_checkable
class Work(Protocol):
    """The memory that a rule takes beside the task vectors, in entries of float32, where torch has so many threads for
    it, or as many as it has now.
    """

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int: ...


@dataclass(frozen=True)
class Workspace:
    """What a rule holds beside the task vectors at its peak, counted in float32: so many tensors of the layer's size,
    `each` more for every expert, and so many square matrices, `squares_each` more for every expert. Their `side` is the
    layer's shorter one, its columns, that of the least-squares system, the smaller of columns and T rows, its rows, at
    most T columns, or the layer's longer one, at most T shorter. `beside` is what a second step at the same time holds
    on top, where torch has two threads (`linalg.threads.side_by_side`). `then` is what the rule holds at another time,
    so that the larger of both counts.
    """

    tensors: int = 4
    squares: int = 0
    side: Literal["shorter", "columns", "system", "rows", "longer"] = "system"
    each: int = 0
    squares_each: int = 0
    beside: Work | None = None
    then: Work | None = None

    def entries(self, experts: int, rows: int, columns: int, threads: int | None = None) -> int:
        short, long = sorted((rows, columns))
        sides = {
            "shorter": short,
            "columns": columns,
            "system": min(columns, experts * rows),
            "rows": min(rows, experts * columns),
            "longer": min(long, experts * short),
        }
        own = (self.tensors + self.each * experts) * rows * columns
        own += (self.squares + self.squares_each * experts) * sides[self.side] ** 2
        if self.beside is not None and (threads or torch.get_num_threads()) > 1:
            own += self.beside.entries(experts, rows, columns, threads)
        return max(own, 0 if self.then is None else self.then.entries(experts, rows, columns, threads))


@dataclass(frozen=True)
class Needs:
    """What a rule asks of its input.

    `matrix`: the formula needs (out, in), other rules take any shape. `base`: it merges weights and wants `Layer.base`.
    `base_energy`: it asks for `Layer.energy_of_base`. `keep`: the share of the largest magnitudes in the whole model
    whose thresholds it wants in `Layer.thresholds`. `entrywise`: an entry of the result depends on the same entry of
    the input alone, and all that is said of it is the status, so that a tensor may be merged in pieces. `weights` and
    `most_experts` bound what it is defined for, `experts` says how many exactly. `moves_equals`: the result is not the
    base's even where no expert has an update. `masks`: its results hold masks, to be written beside the model. `work`
    is the memory it takes, a repetition in float64 included.

    `factors` is how it merges updates of low rank. "linear": M is a combination of the D_t whose coefficients do not
    depend on them. "frame": from D_t = Q_U C_t Q_V^T, orthonormal on both sides, the cores C_t and `Layer.frame` it
    makes the C of M = Q_U C Q_V^T. "left frame": the same where Q_V = I. "full": it must see the full D_t.
    `input_side`: it estimates an expert's inputs from the rows of D_t, which say nothing where experts share them.

    `calibration` is what it wants measured in `Layer.moments`: "inputs", the second moments `Z_t^T Z_t / N` (T, in, in)
    of the layer's inputs in the expert's network; "merged inputs", the same behind blocks that are merged already;
    "gradients", the mean squares (T, *shape) of the gradients of single examples' log-likelihoods; "both sides", the
    second moments (in, in) of the inputs and (out, out) of the gradients at the outputs, one after the other in a row
    (T, in^2 + out^2).
    """

    matrix: bool = False
    base: bool = False
    base_energy: bool = False
    keep: float | None = None
    entrywise: bool = False
    weights: Literal["any", "not negative", "not cancelling"] = "any"
    most_experts: int | None = None
    experts: int | None = None
    moves_equals: bool = False
    masks: bool = False
    work: Work = Workspace()
    factors: Literal["linear", "frame", "left frame", "full"] = "full"
    input_side: bool = False
    calibration: Calibration | None = None

    @property
    def wants_base(self) -> bool:
        return self.base or self.base_energy


@runtime_checkable
class Method(Protocol):
    """A merge rule: a frozen dataclass of its parameters with one pure function.

    It knows no files, devices or names.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def needs(self) -> Needs: ...
    @property
    def scale(self) -> float: ...

    def merge(self, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
        """Merge the task vectors of one layer.

        Args:
            deltas: `D_t = W_t - W_0`, float32 or float64, (T, out, in). Never modified.
            layer: weights, seeds and the like.
        """
        ...

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """Floating-point operations for one layer, a symmetric product at half the price of a general one."""
        ...


_SQUARED = (1e-150, 1e150)  # between these float64 holds the square of a number


def parameter_fields(rule: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The parameters of a rule, or of its class, in their order: every rule is a dataclass of them."""
    return dataclasses.fields(rule)


@runtime_checkable
class Together(Protocol):
    """A rule that merges many small layers of one shape sooner than one after the other."""

    def merge_together(self, stack: Float[Tensor, "P T out in"], layers: Sequence[Layer]) -> list[LayerResult]:
        """What `merge` gives for each of P layers, to rounding, whatever other layers there are."""
        ...


def check_experts(method: Method, weights: Sequence[float]) -> None:
    """UsageError where a rule is not defined for this many experts or for these weights."""
    needs = method.needs
    if needs.most_experts is not None and len(weights) > needs.most_experts:
        what = f"takes at most {needs.most_experts} experts, not {len(weights)}"
        raise UsageError(method.name, what, "merge fewer, or use a rule that takes any number, as karcher")
    if needs.experts is not None and len(weights) != needs.experts:
        what = f"has parameters for {needs.experts} experts, not for {len(weights)}"
        raise UsageError(method.name, what, "give one value for each expert, or one for all")
    if needs.weights == "not negative" and min(weights) < 0:
        raise UsageError(method.name, "an expert has a negative weight", "use weights of zero or more")
    if needs.weights == "not cancelling" and abs(sum(weights)) <= NULL * sum(map(abs, weights)):
        raise UsageError(method.name, "the expert weights sum to zero", "change the weights")


def check_weights(method: Method, weights: Sequence[float]) -> None:
    """UsageError where no expert of all has a weight, or none that can be reckoned with."""
    if not any(weights):
        raise UsageError(method.name, "no expert has a weight", "give at least one that is not zero")
    largest = max(map(abs, weights))
    if not _SQUARED[0] < largest < _SQUARED[1]:
        what = f"the largest weight is {largest:g}, whose square float64 does not hold"
        raise UsageError(method.name, what, "use weights of a size near 1")


def expert_seeds(seed: int, name: str, experts: Sequence[int]) -> tuple[int, ...]:
    """One seed per expert for the tensor `name`: the same whatever else is merged, when or where."""
    return tuple(_hash(f"{seed}/{expert}/{name}") for expert in experts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _stats_from(said: Mapping[str, Any]) -> LayerStats:
    try:
        return LayerStats.from_json(said)
    except ValueError as failure:
        cure = "give a LayerStats, and what is the rule's own under keys of its own"
        raise UsageError("the stats of a rule's result", str(failure), cure) from None


def no_update(deltas: Float[Tensor, "T *shape"]) -> LayerResult:
    """The result where no expert has an update that counts."""
    return LayerResult(torch.zeros_like(deltas[0]), LayerStats((Status.NO_UPDATE,)))
