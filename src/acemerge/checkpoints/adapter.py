"""What a low-rank adapter says of its base's tensors, without any values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from acemerge.checkpoints.header import TensorSpec


@dataclass(frozen=True)
class Update:
    """`D = s B A` for one tensor, `A` (r, in) and `B` (out, r); with DoRA the rows of `W0 + D` have `magnitude` (out,).

    `transposed`: the tensor is stored (in, out), as GPT-2's Conv1D and embeddings are. `replaces_base`: the adapter
    holds the weight that it starts from under the tensor's own name.
    """

    A: TensorSpec
    B: TensorSpec
    scaling: float
    magnitude: TensorSpec | None = None
    transposed: bool = False
    embedding: bool = False
    replaces_base: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def factors(self) -> tuple[TensorSpec, ...]:
        return (self.A, self.B) if self.magnitude is None else (self.A, self.B, self.magnitude)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor as it is stored."""
        rows, columns = self.B.shape[0], self.A.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Adapter:
    """The low-rank updates of an adapter by the name of the tensor, and how many tensors it holds whole.

    With `on_a_model` they change a model of its own, which has all tensors; else the base.
    """

    updates: Mapping[str, Update]
    whole: int = 0
    on_a_model: bool = False

    def __str__(self) -> str:
        ranks = sorted({update.rank for update in self.updates.values()})
        kind = "DoRA" if any(update.magnitude for update in self.updates.values()) else "LoRA"
        rank = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks)) or 'none'}"
        whole = f" and {self.whole} whole" if self.whole else ""
        return f"{kind} adapter, {rank}, {len(self.updates)} tensors{whole}"
