"""Models with different vocabularies: which row of each expert's embedding is which token of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from acemerge.shapes import Float, Int, Tensor

Tokens = Mapping[str, int]  # token string -> row
VocabularyPolicy = Literal["base", "union", "assets"]


NOBODY, MEAN = -1, -2  # lenders: of a row of zeros, and of the mean of all that have it


@dataclass(frozen=True)
class Lending:
    """What a model without a token has in its place.

    `base` (rows,) are the base's own rows, -1 where it does not have the token. `lenders` (rows,) say whose row the
    others get: 0 for the base's, i for the i-th expert's, else `NOBODY` or `MEAN`. `models` are those that lend, each
    once.
    """

    base: Int[Tensor, " rows"]
    lenders: Int[Tensor, " rows"]
    models: tuple[int, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the output, and where each expert has them.

    `sources` (T, rows) are the experts' own rows, -1 where an expert does not have the token. `added` are the
    tokens that the base lacks, with their rows. With `lending` all models have every token.
    """

    policy: VocabularyPolicy
    rows: int
    sources: Int[Tensor, "T rows"]
    added: Mapping[str, int]
    lending: Lending | None = None

    @property
    def reason(self) -> str:
        """What was matched, for the manifest."""
        counts = (self.sources >= 0).sum(1).tolist()
        more = f", {len(self.added):,} added" if self.policy == "union" else ""
        return f"rows matched by token, policy {self.policy}: {self.rows:,} rows{more}; experts have {counts}"

    def own(self, model: int) -> Int[Tensor, " rows"]:
        """A model's own rows: of the base, 0, or the i-th expert."""
        return self.sources[model - 1] if model or self.lending is None else self.lending.base


def match(
    policy: VocabularyPolicy,
    base: Tokens,
    base_rows: int,
    experts: Sequence[Tokens],
    expert_rows: Sequence[int],
) -> Vocabulary:
    """Rows by token string: the base's tokens, and with `union` behind them what the experts have beside.

    Rows without a token, as padding, are matched by their number where an expert has no token there either.
    """
    added = added_tokens(base, experts) if policy == "union" else {}
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


def added_tokens(base: Tokens, experts: Sequence[Tokens]) -> dict[str, int]:
    """The tokens that the base lacks, with their rows behind its own: the experts' in their order."""
    added: dict[str, int] = {}
    behind = max(base.values(), default=-1) + 1
    for tokens in experts:
        new = sorted((row, token) for token, row in tokens.items() if token not in base and token not in added)
        added |= {token: behind + len(added) + i for i, (_, token) in enumerate(new)}
    return added


def lend(
    policy: VocabularyPolicy,
    wanted: Tokens,
    added: Tokens,
    models: Sequence[tuple[Tokens, int] | None],
    lenders: Sequence[int],
    prefer_base: bool,
) -> Vocabulary:
    """Rows by token string for all of `wanted`, each model having all of them.

    `models` are the base and the experts by their tokens and how many rows they have, None for one that is no part.
    A token that one of the `lenders` has is that one's; of those that several have, the base's if it is to be
    preferred and has it, else their mean. One that nobody has is zeros.
    """
    rows = max(wanted.values(), default=-1) + 1
    own = torch.full((len(models), rows), -1)
    for found, model in zip(own, models, strict=True):
        for token, row in wanted.items():
            there = model[0].get(token, -1) if model else -1
            found[row] = there if model and there < model[1] else -1
    has = own[list(lenders)] >= 0
    whose = torch.tensor(lenders)[has.int().argmax(0)]  # the first that has it
    several = has.sum(0) > 1
    whose[several & ~(prefer_base & (own[0] >= 0))] = MEAN
    whose[several & prefer_base & (own[0] >= 0)] = 0
    whose[~has.any(0)] = NOBODY
    return Vocabulary(policy, rows, own[1:], added, Lending(own[0], whose, tuple(lenders)))


def differing(base: Tokens, expert: Tokens) -> int:
    """How many of the tokens that both have are in another row."""
    return sum(base[token] != row for token, row in expert.items() if token in base)


def rows_of(values: Float[Tensor, "own *rest"], sources: Int[Tensor, " rows"]) -> Float[Tensor, "rows *rest"]:
    """An expert's values in the order of the output; whatever where it has none."""
    return values[sources.clamp(min=0).to(values.device)]


def lent_rows(
    values: Mapping[int, Float[Tensor, "own *rest"]], vocabulary: Vocabulary, out: Float[Tensor, "rows *rest"]
) -> None:
    """Into `out` the rows that models without a token get; `values` are the matrices of all that lend."""
    assert vocabulary.lending is not None
    lenders, models = vocabulary.lending.lenders, vocabulary.lending.models
    out.zero_()
    for i in models:
        lends = (lenders == i).nonzero().flatten()
        shares = ((lenders == MEAN) & (vocabulary.own(i) >= 0)).nonzero().flatten()
        for places in (lends, shares):
            out.index_add_(0, places.to(out.device), rows_of(values[i], vocabulary.own(i)[places]).to(out))
    has = torch.stack([vocabulary.own(i) >= 0 for i in models]).sum(0)
    counts = torch.where(lenders == MEAN, has, 1).to(out)
    out.div_(counts.view(-1, *[1] * (out.ndim - 1)))


def in_order(
    values: Float[Tensor, "own *rest"],
    own: Int[Tensor, " rows"],
    lent: Float[Tensor, "rows *rest"],
    out: Float[Tensor, "rows *rest"],
) -> None:
    """Into `out` a model's values in the order of the output, its own rows where it has the token."""
    has = (own >= 0).nonzero().flatten()
    out.copy_(lent).index_copy_(0, has.to(out.device), rows_of(values, own[has]).to(out))
