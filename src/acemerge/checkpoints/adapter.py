"""What a low-rank adapter says of its base's tensors, without any values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from acemerge.checkpoints.header import TensorSpec


@dataclass(frozen=True)
class StackedFactors:
    """A factor pair of all experts of a mixture in one: `A` (count r, in), expert by expert, and `B` (out, r count), in
    which an expert has every count-th column.

    `number` is the expert whose matrix this is, and `part` of `parts` the share of its rows, where gate and up lie in
    one; without a number the tensor holds all experts, (count, out, in).
    """

    count: int
    number: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Update:
    """`D = s B A` for one tensor, `A` (r, in) and `B` (out, r); with DoRA the rows of `W0 + D` have `magnitude` (out,).

    `transposed`: the tensor is stored (in, out), as GPT-2's Conv1D and embeddings are. `replaces_base`: the adapter
    holds the weight that it starts from under the tensor's own name. `stack`: the factors are those of many experts.
    """

    A: TensorSpec
    B: TensorSpec
    scaling: float
    magnitude: TensorSpec | None = None
    transposed: bool = False
    embedding: bool = False
    replaces_base: bool = False
    stack: StackedFactors | None = None

    @property
    def rank(self) -> int:
        """Of one matrix."""
        return self.A.shape[0] // (self.stack.count if self.stack else 1)

    @property
    def factors(self) -> tuple[TensorSpec, ...]:
        return (self.A, self.B) if self.magnitude is None else (self.A, self.B, self.magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor as it is stored."""
        rows, columns = self.B.shape[0] // (self.stack.parts if self.stack else 1), self.A.shape[1]
        matrix = (columns, rows) if self.transposed else (rows, columns)
        return matrix if self.stack is None or self.stack.number is not None else (self.stack.count, *matrix)


@dataclass(frozen=True)
class Adapter:
    """The low-rank updates of an adapter by the name of the tensor, and how many tensors it holds whole.

    With `on_a_model` they change a model of its own, which has all tensors; else the base. `saved` are the names of
    whole tensors that were trained as copies of their own: what their base ties to them it does not change.
    """

    updates: Mapping[str, Update]
    whole: int = 0
    on_a_model: bool = False
    saved: frozenset[str] = frozenset()

    def __str__(self) -> str:
        ranks = sorted({update.rank for update in self.updates.values()})
        kind = "DoRA" if any(update.magnitude for update in self.updates.values()) else "LoRA"
        rank = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks)) or 'none'}"
        whole = f" and {self.whole} whole" if self.whole else ""
        return f"{kind} adapter, {rank}, {len(self.updates)} tensors{whole}"
