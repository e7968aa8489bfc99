"""Which tensors have a row per token, and how those of models with different vocabularies are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import CheckpointError, UsageError
from acemerge.jobs import Job, Source
from acemerge.methods.elementwise import Average
from acemerge.policy import Decision
from acemerge.recipe import Recipe
from acemerge.roles import Role, Roles
from acemerge.vocabulary import Tokens, Vocabulary, differing, match

_HEAD_BIASES = ("lm_head.bias", "decoder.bias", "predictions.bias", "final_logits_bias")


@dataclass(frozen=True)
class VocabularyOf:
    """The vocabulary of the output, and for each of its tensors, by identity, their names in the experts."""

    rows: Vocabulary
    tensors: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class VocabularyPlanner:
    """Looks at the tensors with a row per token in the base, `models[0]`, and in the experts."""

    recipe: Recipe
    models: Sequence[Source]
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
        return VocabularyOf(matched, {identity: found[1:] for identity, found in names.items()})

    def _who(self) -> list[str]:
        return ["base", *(f"expert {label}" for label in self.labels)]

    def _names(self) -> dict[str, tuple[str, ...]]:
        """Tensors with a row per token: by identity their name in every model, empty where one lacks it."""
        base, identity = self.models[0], self.roles.identity
        rows = self._vocabulary_size()
        found = [name for name, spec in base.tensors.items() if self._is_per_token(name, spec, rows)]
        by_identity = [{identity[name]: name for name in reversed(list(m.tensors))} for m in self.models]
        return {identity[name]: tuple(names.get(identity[name], "") for names in by_identity) for name in found}

    def _is_per_token(self, name: str, spec: TensorSpec, rows: int) -> bool:
        of_tokens = self.roles.by_name[name].name in ("embedding", "output_head") or name.endswith(_HEAD_BIASES)
        return of_tokens and bool(spec.shape) and spec.shape[0] == rows

    def _vocabulary_size(self) -> int:
        """The configuration's word where an embedding has so many rows, else the largest embedding's."""
        base = self.models[0]
        sizes = {s.shape[0] for n, s in base.tensors.items() if s.shape and self.roles.by_name[n].name == "embedding"}
        config = base.config.get("text_config") if "vocab_size" not in base.config else base.config
        told = config.get("vocab_size") if isinstance(config, dict) else None
        return told if told in sizes else max(sizes, default=0)

    def _rows(self, names: Mapping[str, tuple[str, ...]]) -> list[int]:
        """The rows of each model's vocabulary, the same in all of its tensors."""
        counts = []
        for who, model, own in zip(self._who(), self.models, zip(*names.values(), strict=True), strict=True):
            shapes = {model.tensors[name].shape[0] for name in own if name}
            if len(shapes) != 1 or not all(own):
                what = "its embedding and output head have different rows" if all(own) else "lacks an embedding"
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


def by_token(out: TensorSpec, role: Role, decision: Decision, vocabulary: VocabularyOf, identity: str) -> Job:
    """The job of a tensor with a row per token."""
    rows = vocabulary.rows
    if decision.action != "merge" and rows.rows == out.shape[0]:
        return Job(out, role, decision.reason, entrywise=True)
    if decision.action != "merge" or not isinstance(decision.method, Average):
        what = f"tensor {out.name!r} gets another rule than average"
        raise UsageError("vocabulary", what, "leave tensors with a row per token to the policy")
    shape = (rows.rows, *out.shape[1:])
    job = Job(replace(out, shape=shape), role, rows.reason, decision.method, sources=vocabulary.tensors[identity])
    return replace(job, vocabulary=rows)
