"""What a rule says of a layer: how it came to its result, and the numbers on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from acemerge.errors import UsageError
from acemerge.methods.status import Status, Statuses, of_all, read_statuses, spelled


def _number(value: Any) -> float:
    if value is None:  # JSON has no word for what is not finite
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.60} is no number")
    return value


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no list of numbers")
    return tuple(map(_number, value))


def _undefined(value: Any) -> float | None:
    return None if value is None else _number(value)


def _one_of(*known: object) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not any(value is word or (isinstance(word, str) and value == word) for word in known):
            raise ValueError(f"{value!r:.60} is none of {known}")
        return value

    return read


def _said(read: Callable[[Any], Any], key: str = "", beside: str = "") -> Any:
    """A number that not every rule has: how it is read, its key in the manifest where that is another, and the
    attribute beside which it stands there even if it is None.
    """
    return field(default=None, metadata={"read": read, "key": key, "beside": beside})


@dataclass(frozen=True, eq=False)  # equal is what the manifest says alike
class LayerStats(Mapping[str, Any]):
    """What a rule says of one layer: `statuses`, and of the numbers those that it has; None for the others.

    As a mapping it is what the manifest says: `stats["status"]` are the phrases of the statuses, `dict(stats)` is plain
    JSON. `own` are what a rule has beyond these, plain numbers, strings and lists under keys of its own. `slices` and
    `projections` are there where a rule merged the matrices of a tensor one by one.

    Of ace: `gamma`, None where it is undefined, `branch`, `eps`, and `refined` singular values. `log_energy_variance`
    is `var(log n_t)`. `condition` and `rank` are the system's, `float64_spectra` counts the spectra not left to
    float32. `steps`, `residual` and `last_step` are of iterations. `relative_step` is how far a
    rule would move the weights beside the weights themselves. `own_l1` and `masked_l1` give the scales of emr.
    `side` is the one that second moments were estimated on, `energy_lost` what a truncation took.
    """

    statuses: Statuses = (Status.OK,)
    slices: tuple[LayerStats, ...] = ()
    projections: tuple[LayerStats, ...] = ()
    gamma: float | None = _said(_undefined, beside="branch")
    branch: Literal["homogeneous", "heterogeneous"] | None = _said(_one_of("homogeneous", "heterogeneous"))
    eps: float | None = _said(_number)
    log_energy_variance: float | None = _said(_undefined, key="heterogeneity", beside="shrinkage")
    shrinkage: tuple[float, ...] | None = _said(_numbers)
    condition: float | None = _said(_number)
    rank: int | None = _said(_number)
    refined: int | None = _said(_number)
    float64_spectra: int | None = _said(_number)
    steps: int | None = _said(_number)
    residual: float | None = _said(_number)
    last_step: float | None = _said(_number)
    relative_step: float | None = _said(_number)
    agreement: float | None = _said(_number)
    cosine: float | None = _said(_number)
    share: float | None = _said(_number)
    t: float | None = _said(_number)
    weights: tuple[float, ...] | None = _said(_numbers)
    kept: float | None = _said(_number)
    thresholds: tuple[float, ...] | None = _said(_numbers)
    own_l1: tuple[float, ...] | None = _said(_numbers)
    masked_l1: tuple[float, ...] | None = _said(_numbers)
    shared_input_side: bool | None = _said(_one_of(True, False))
    side: Literal["input", "output"] | None = _said(_one_of("input", "output"))
    energy_lost: float | None = _said(_number)
    own: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = self.own.keys() & KEYS
        if taken:
            what = f"{min(taken)!r} is no key of a rule's own: the manifest has it already"
            raise UsageError("the stats of a rule's result", what, "use another key, or the attribute")

    @property
    def parts(self) -> tuple[LayerStats, ...]:
        """Of every slice or projection, or this alone."""
        return self.slices or self.projections or (self,)

    def largest(self, number: Callable[[LayerStats], float | None]) -> float | None:
        """The largest of a number over the parts, of those that are finite."""
        found = (number(part) for part in self.parts)
        return max((float(x) for x in found if x is not None and math.isfinite(x)), default=None)

    @property
    def branches(self) -> str | None:
        """ACE's branch, `mixed` where parts differ."""
        found = {part.branch for part in self.parts if part.branch is not None}
        return None if not found else "mixed" if len(found) > 1 else found.pop()

    def to_json(self) -> dict[str, Any]:
        """As the manifest says it."""
        plain: dict[str, Any] = {"status": spelled(self.statuses)}
        for key in ("slices", "projections"):
            if parts := getattr(self, key):
                plain[key] = [part.to_json() for part in parts]
        for key, (name, _, beside) in _SAID.items():
            value = getattr(self, name)
            if value is not None or (beside and getattr(self, beside) is not None):
                plain[key] = list(value) if isinstance(value, tuple) else value
        return plain | dict(self.own)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> LayerStats:
        """From what the manifest says, or a rule that gives a plain mapping. ValueError names what is malformed."""
        found: dict[str, Any] = {"own": {key: value for key, value in content.items() if key not in KEYS}}
        if not isinstance(content.get("status"), str):
            raise ValueError("'status' is missing, or no string")
        found["statuses"] = read_statuses(content["status"])
        for key in ("slices", "projections"):
            found[key] = _parts(key, content.get(key, []))
        for key in content.keys() & _SAID.keys():
            name, read, _ = _SAID[key]
            try:
                found[name] = read(content[key])
            except ValueError as failure:
                raise ValueError(f"{key!r}: {failure}") from None
        return LayerStats(**found)

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())


def _parts(key: str, value: Any) -> tuple[LayerStats, ...]:
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise ValueError(f"{key!r} is no list of tables")
    return tuple(map(LayerStats.from_json, value))


# By their keys in the manifest: attribute, how it is read, beside which it stands.
_SAID = {
    found.metadata["key"] or found.name: (found.name, found.metadata["read"], found.metadata["beside"])
    for found in fields(LayerStats)
    if found.metadata
}
KEYS = _SAID.keys() | {"status", "slices", "projections"}


def on_host(stats: LayerStats, helped: bool) -> LayerStats:
    """What is said of a layer, and that the host did what its device could not where it has `helped`."""
    if not helped or Status.ON_HOST in stats.statuses:
        return stats
    before = () if stats.statuses == (Status.OK,) else stats.statuses
    return replace(stats, statuses=(*before, Status.ON_HOST))


def of_slices(parts: Sequence[LayerStats]) -> LayerStats:
    """What is said of a stack of matrices that were merged one by one."""
    return LayerStats(of_all(part.statuses for part in parts), slices=tuple(parts))


def of_projections(parts: Sequence[LayerStats]) -> LayerStats:
    """What is said of a weight whose projections were merged one by one."""
    return LayerStats(of_all(part.statuses for part in parts), projections=tuple(parts))
