"""Models with different vocabularies: which row of each expert's embedding is which token of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from acemerge.shapes import Float, Int, Tensor

Tokens = Mapping[str, int]  # token string -> row


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the output, and where each expert has them.

    `sources` (T, rows) are the experts' own rows, -1 where an expert does not have the token. `added` are the
    tokens that the base lacks, with their rows.
    """

    policy: Literal["base", "union"]
    rows: int
    sources: Int[Tensor, "T rows"]
    added: Mapping[str, int]

    @property
    def reason(self) -> str:
        """What was matched, for the manifest."""
        counts = (self.sources >= 0).sum(1).tolist()
        more = f", {len(self.added):,} added" if self.policy == "union" else ""
        return f"rows matched by token, policy {self.policy}: {self.rows:,} rows{more}; experts have {counts}"


def match(
    policy: Literal["base", "union"],
    base: Tokens,
    base_rows: int,
    experts: Sequence[Tokens],
    expert_rows: Sequence[int],
) -> Vocabulary:
    """Rows by token string: the base's tokens, and with `union` behind them what the experts have beside.

    Rows without a token, as padding, are matched by their number where an expert has no token there either.
    """
    added: dict[str, int] = {}
    if policy == "union":
        behind = max(base.values(), default=-1) + 1
        for tokens in experts:
            new = sorted((row, token) for token, row in tokens.items() if token not in base and token not in added)
            added |= {token: behind + len(added) + i for i, (_, token) in enumerate(new)}
    rows = max(base_rows, max(added.values(), default=-1) + 1)
    names = {row: token for token, row in (*base.items(), *added.items())}
    sources = torch.full((len(experts), rows), -1)
    for found, tokens, count in zip(sources, experts, expert_rows, strict=True):
        taken = set(tokens.values())
        own = [
            tokens.get(names[r], -1) if r in names else (r if r < base_rows and r not in taken else -1)
            for r in range(rows)
        ]
        found.copy_(torch.tensor([row if row < count else -1 for row in own]))
    return Vocabulary(policy, rows, sources, added)


def differing(base: Tokens, expert: Tokens) -> int:
    """How many of the tokens that both have are in another row."""
    return sum(base[token] != row for token, row in expert.items() if token in base)


def rows_of(values: Float[Tensor, "own *rest"], sources: Int[Tensor, " rows"]) -> Float[Tensor, "rows *rest"]:
    """An expert's values in the order of the output; whatever where it has none."""
    return values[sources.clamp(min=0).to(values.device)]
