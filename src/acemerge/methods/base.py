"""The one interface of a merge rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from acemerge.shapes import Float, Tensor


@dataclass(frozen=True)
class LayerResult:
    """What a rule made of one layer.

    `delta` (out, in) is `scale * M`: the merged weight is `W_0 + delta`. `stats` holds plain numbers,
    strings and lists, among them `status`: "ok", or what the rule had to fall back to.
    """

    delta: Float[Tensor, "*shape"]
    stats: Mapping[str, Any]


class Method(Protocol):
    """A merge rule: a frozen dataclass of its parameters with one pure function.

    It knows no files, devices or names. `requires_matrix` is true where the formula needs (out, in);
    the other rules take tensors of any shape.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    requires_matrix: ClassVar[bool]

    @property
    def scale(self) -> float: ...

    def merge(self, deltas: Float[Tensor, "T *shape"], weights: Float[Tensor, " T"]) -> LayerResult:
        """Merge the task vectors of one layer.

        Args:
            deltas: `D_t = W_t - W_0`, float32 or float64, (T, out, in). Never modified.
            weights: one weight per expert, float64 on the same device.
        """
        ...

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """Floating-point operations for one layer, a symmetric product at half the price of a general one."""
        ...
