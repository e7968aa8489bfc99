"""What experts' tokenizers have and the output's does not: template, end of turn, tokens. To warn by, nothing more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.template import end_of_text, read_template
from acemerge.errors import CheckpointError
from acemerge.models.vocabulary import Tokens
from acemerge.recipes.recipe import Recipe

Answer = TypeVar("Answer")


def lost_assets(
    recipe: Recipe,
    base: Checkpoint,
    owner: Checkpoint,
    experts: Mapping[str, Checkpoint],
    tokens: Mapping[str, Tokens | None],
) -> list[str]:
    """One line for each thing that is lost. `owner` is the model whose files the output gets; `tokens` are the
    experts' and, under the empty label, the owner's. An expert that ends where the base does has lost nothing.
    """
    others = {label: expert for label, expert in experts.items() if expert.path != owner.path and expert.assets}
    notes = []
    templates = [label for label, expert in others.items() if _asked(read_template, expert)]
    if templates and not recipe.chat_template and not _asked(read_template, owner):
        cure = f"`chat_template: auto` writes the commonest, {_files_of(templates[0], recipe)}"
        notes.append(f"{_who(templates, 'has', 'have')} a chat template, which the output lacks; {cure}")
    ours, before = (_asked(end_of_text, model) or {} for model in (owner, base))
    ends = {label: _asked(end_of_text, expert) or {} for label, expert in others.items()}
    for key in ("eos_token", "eos_token_id"):
        other = {
            label: end[key]
            for label, end in ends.items()
            if key in end and end[key] not in (ours.get(key), before.get(key))
        }
        if other:
            label, value = next(iter(other.items()))
            said = f"the output's {key} is {ours.get(key, 'not set')!r:.60}, that of {_who([*other])} {value!r:.60}"
            notes.append(f"{said}: it may not end where they do; {_files_of(label, recipe)}")
    known = tokens.get("")
    more = {
        label: [*(own.keys() - known.keys())] for label, own in tokens.items() if label and own and known is not None
    }
    more = {label: found for label, found in more.items() if found}
    if more and recipe.vocabulary in ("refuse", "base"):
        label, found = next(iter(more.items()))
        said = f"{_who([*more], 'has', 'have')} tokens that the output's tokenizer lacks, as {min(found)!r:.40}"
        notes.append(f"{said}; {_files_of(label, recipe)}, `vocabulary: union` adds them all")
    return notes


def _files_of(label: str, recipe: Recipe) -> str:
    """The cure that takes an expert's files, and the rows of its tokens where rows are matched by token."""
    keys = f"`assets: {label}`"
    if recipe.vocabulary in ("base", "union"):
        keys += " with `vocabulary: assets` and `missing_tokens: mean`"
    return f"{keys} takes that one's files"


def _asked(ask: Callable[[Checkpoint], Answer], model: Checkpoint) -> Answer | None:
    """None, too, where the file is damaged: the merge itself does not read it."""
    with contextlib.suppress(CheckpointError):
        return ask(model)
    return None


def _who(labels: Sequence[str], one: str = "", several: str = "") -> str:
    verb = one if len(labels) == 1 else several
    names = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
    return f"expert{'' if len(labels) == 1 else 's'} {names}{' ' if verb else ''}{verb}"
