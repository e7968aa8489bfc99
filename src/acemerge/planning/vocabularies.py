"""Which tensors have a row per token, and how those of models with different vocabularies are matched."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import CheckpointError, UsageError, fetching
from acemerge.methods.elementwise import Average
from acemerge.models.roles import Role, Roles
from acemerge.models.vocabulary import Tokens, Vocabulary, added_tokens, differing, lend, match
from acemerge.planning.jobs import Keep, MergeByToken, ModelHeader
from acemerge.planning.policy import Decision
from acemerge.recipes.recipe import Recipe

_HEAD_BIASES = ("lm_head.bias", "decoder.bias", "predictions.bias", "final_logits_bias")


@dataclass(frozen=True)
class VocabularyOf:
    """For each tensor with a row per token, by identity: its rows, and its names in the experts."""

    tensors: Mapping[str, tuple[Vocabulary, tuple[str, ...]]]


@dataclass(frozen=True)
class VocabularyPlanner:
    """Looks at the tensors with a row per token in the base, `models[0]`, and in the experts."""

    recipe: Recipe
    models: Sequence[ModelHeader]
    labels: Sequence[str]
    roles: Roles

    def match(self, tokens: Sequence[Tokens | None], warnings: list[str]) -> VocabularyOf | None:
        """The rows matched as the recipe asks; None where all models agree, or where it asks for nothing.

        Then tokens that lie in other rows of an expert are warned of.
        """
        names = self._names()
        if self.recipe.vocabulary == "refuse" or not names:
            self._warn(tokens, warnings)
            return None
        if self.recipe.missing_tokens != "skip":
            return self._lent(names, tokens)
        counts = self._rows(names)
        known = list(tokens) or [None] * len(self.models)
        base_tokens = known[0]
        for who, found, count in zip(self._who(), known, counts, strict=True):
            if (found is None or base_tokens is None) and count != counts[0]:
                where = who if found is None else "base"
                cure = "copy its tokenizer.json into its folder"
                raise CheckpointError(where, "has no list of tokens to match the vocabularies by", cure)
        ours = base_tokens or {}
        theirs = [ours if found is None or base_tokens is None else found for found in known[1:]]
        matched = match(self.recipe.vocabulary, ours, counts[0], theirs, counts[1:])
        alike = torch.equal(matched.sources, torch.arange(counts[0]).repeat(len(theirs), 1))
        if matched.rows == counts[0] and alike and len(set(counts)) == 1:
            return None
        return VocabularyOf({identity: (matched, found[1:]) for identity, found in names.items()})

    def _lent(self, names: Mapping[str, tuple[str, ...]], tokens: Sequence[Tokens | None]) -> VocabularyOf | None:
        """The rows of every tensor, each model having those of the others where it lacks a token."""
        policy, owner = self.recipe.vocabulary, self.recipe.assets_number(self.labels) or 0
        assert policy != "refuse"
        if tokens[owner] is None:
            what = "has no list of tokens to match the vocabularies by"
            raise CheckpointError(self._who()[owner], what, "copy its tokenizer.json into its folder")
        ours = tokens[owner] or {}
        known = [ours if found is None else found for found in tokens]
        added = added_tokens(ours, known) if policy == "union" else {}
        made = {}
        for identity, found in names.items():
            part = self.recipe.slice_of(next(name for name in found if name))
            of = [part.base_from if part else 0, *range(1, len(known))]
            counts = [m.tensors[name].shape[0] if name else 0 for m, name in zip(self.models, found, strict=True)]
            models = [(known[i], count) if name else None for i, name, count in zip(of, found, counts, strict=True)]
            paths = {self.recipe.models[i]: number for number, i in reversed([*enumerate(of)]) if models[number]}
            rows = lend(
                policy,
                {**ours, **added},
                added,
                models,
                sorted(paths.values()),
                self.recipe.missing_tokens == "base",
            )
            alike = [not model or torch.equal(rows.own(i), torch.arange(model[1])) for i, model in enumerate(models)]
            made[identity] = rows, found[1:], all(alike)
        if all(alike for _, _, alike in made.values()):
            return None
        return VocabularyOf({identity: (rows, found) for identity, (rows, found, _) in made.items()})

    def _who(self) -> list[str]:
        return ["base", *(f"expert {label}" for label in self.labels)]

    def _names(self) -> dict[str, tuple[str, ...]]:
        """Tensors with a row per token: by identity their name in every model, empty where one lacks it."""
        base, identity = self.models[0], self.roles.identity
        # With slices the base's own may be another model's.
        sizes = {self._vocabulary_size(model) for model in (self.models if self.recipe.slices else self.models[:1])}
        found = [name for name, spec in base.tensors.items() if self._is_per_token(name, spec, sizes)]
        by_identity = [{identity[name]: name for name in reversed(list(m.tensors))} for m in self.models]
        return {identity[name]: tuple(names.get(identity[name], "") for names in by_identity) for name in found}

    def _is_per_token(self, name: str, spec: TensorSpec, sizes: Collection[int]) -> bool:
        of_tokens = self.roles.by_name[name].name in ("embedding", "output_head") or name.endswith(_HEAD_BIASES)
        return of_tokens and bool(spec.shape) and spec.shape[0] in sizes

    def _vocabulary_size(self, model: ModelHeader) -> int:
        """The configuration's word where an embedding has so many rows, else the largest embedding's."""
        sizes = {s.shape[0] for n, s in model.tensors.items() if s.shape and self.roles.by_name[n].name == "embedding"}
        config = model.config.get("text_config") if "vocab_size" not in model.config else model.config
        told = config.get("vocab_size") if isinstance(config, dict) else None
        return told if told in sizes else max(sizes, default=0)

    def _rows(self, names: Mapping[str, tuple[str, ...]]) -> list[int]:
        """The rows of each model's vocabulary, the same in all of its tensors."""
        counts = []
        for who, model, own in zip(self._who(), self.models, zip(*names.values(), strict=True), strict=True):
            shapes = {model.tensors[name].shape[0] for name in own if name}
            if len(shapes) != 1 or not all(own):
                if not all(own):
                    raise CheckpointError(who, "lacks an embedding or an output head", fetching("it again"))
                what = "its embedding and output head have different rows"
                raise CheckpointError(who, what, "bring them to one size first")
            counts.append(shapes.pop())
        for identity, own in names.items():
            widths = {model.tensors[name].shape[1:] for model, name in zip(self.models, own, strict=True)}
            if len(widths) > 1:
                raise CheckpointError(f"tensor {identity!r}", "differs in width", "merge models of one size")
        return counts

    def _warn(self, tokens: Sequence[Tokens | None], warnings: list[str]) -> None:
        base, *experts = tokens or [None]
        for label, expert in zip(self.labels, experts, strict=bool(experts)):
            count = differing(base, expert) if base and expert else 0
            if count:
                cure = "vocabulary: base matches the rows by token"
                warnings.append(f"expert {label}: {count:,} tokens have other ids than in the base; {cure}")


def by_token(
    out: TensorSpec,
    role: Role,
    decision: Decision,
    vocabulary: VocabularyOf,
    identity: str,
    weights: tuple[float, ...],
    absent: frozenset[int],
) -> Keep | MergeByToken:
    """The job of a tensor with a row per token."""
    rows, names = vocabulary.tensors[identity]
    method = decision.method
    if method is None and rows.rows == out.shape[0] and rows.lending is None:
        return Keep(out, role, decision.reason)
    if method is None or (rows.lending is None and not isinstance(method, Average)):
        what = f"tensor {out.name!r} gets another rule than average"
        raise UsageError("vocabulary", what, "leave tensors with a row per token to the policy")
    reason = rows.reason if rows.lending is None else f"{decision.reason}; {rows.reason}"
    spec = replace(out, shape=(rows.rows, *out.shape[1:]))
    return MergeByToken(
        spec, role, reason, names, method=method, weights=weights, absent=absent, pool=decision.pool, vocabulary=rows
    )
