"""Models brought under the names, the layout and the tokens that their base knows."""

from __future__ import annotations

from collections.abc import Sequence

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.tokenizer import read_tokens, same_tokenizer
from acemerge.checkpoints.wrappers import without_wrapper
from acemerge.errors import CheckpointError
from acemerge.models.mixtures import as_stored
from acemerge.models.roles import Roles, find_roles
from acemerge.models.submodels import as_part
from acemerge.models.tied_heads import heads_apart
from acemerge.models.vocabulary import Tokens
from acemerge.recipes.recipe import Recipe


def unwrapped(
    base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str]
) -> tuple[Sequence[Checkpoint], list[str]]:
    """The experts without a wrapper's part in their names, and of which it was taken off."""
    found = [without_wrapper(expert, base.tensors) for expert in experts]
    notes = [f"expert {label}: {about}" for label, (_, about) in zip(labels, found, strict=True) if about]
    return [expert for expert, _ in found], notes


def matched(
    base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str]
) -> tuple[Sequence[Checkpoint], Roles, list[str]]:
    """All models under names that the base knows, their roles, and what was done about those that differ."""
    # The experts' own names too: a tied tensor may have its other spelling there only.
    specs = {name: spec for source in (*reversed(experts), base) for name, spec in source.tensors.items()}
    roles, models, notes = find_roles(base.config, specs), [base], []
    for label, expert in zip(labels, experts, strict=True):
        model, part = as_part(expert, label, base, roles)
        model, layout = as_stored(model, label, base, roles)
        models.append(model)
        notes += [note for note in (part, layout) if note]
    who = ["base", *(f"expert {label}" for label in labels)]
    apart, roles, tied = heads_apart(models, who, roles)
    return apart, roles, [*notes, *tied]


def tokens_of(recipe: Recipe, models: Sequence[Checkpoint]) -> Sequence[Tokens | None]:
    """The tokens of every model; nothing where all have the same and nothing is to be matched."""
    if recipe.vocabulary != "refuse":
        return [read_tokens(model) for model in models]
    if same_tokenizer([model for model in models if model.adapter is None]):
        return ()
    return [_tokens_if_readable(model) for model in models]


def _tokens_if_readable(model: Checkpoint) -> Tokens | None:
    """To warn by: the merge itself does not need them."""
    try:
        return read_tokens(model)
    except CheckpointError:
        return None
