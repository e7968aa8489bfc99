"""What a recipe asks for that is probably not what was meant: a line each, and the merge goes on."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.models.roles import Roles, role_by_name
from acemerge.planning.jobs import ByRule
from acemerge.recipes.recipe import Recipe

_WILD = "*?[]!"


def of_recipe(recipe: Recipe, names: Collection[str]) -> list[str]:
    """Rules that match no tensor of these names, and an expert that is alone."""
    found = [
        f"rule {rule.match!r} matches no tensor; {_nearest(rule.match, names)}"
        for rule in recipe.rules
        if rule.match not in names and not any(fnmatchcase(name, rule.match) for name in names)
    ]
    if len(recipe.experts) == 1 and recipe.as_lora is None and not recipe.build_method().needs.base:
        found.append("there is one expert only: what is written lies between it and the base; name more to merge them")
    return found


def of_heads(ruled: Sequence[ByRule], roles: Roles) -> list[str]:
    """An output head over the vocabulary that gets a rule for layers."""
    heads = [job for job in ruled if job.method.needs.matrix and _is_head(job, roles)]
    if not heads:
        return []
    what = f"{heads[0].name} is an output head, by {heads[0].rule}"
    return [f"{what}: where measured it was up to 7 points worse than the average (docs/concepts/policies.md)"]


def _is_head(job: ByRule, roles: Roles) -> bool:
    """Whether it is one, or an embedding that is tied to one."""
    tied = roles.tied.get(roles.identity[job.name], ())
    names = [role_by_name(replace(job.spec, name=name), conv1d=False).name for name in tied]
    return "output_head" in (job.role.name, *names)


def _nearest(pattern: str, names: Collection[str]) -> str:
    """The tensors whose names have parts that are most like what the pattern spells out."""
    spelt = pattern.strip(_WILD + ".")
    length = spelt.count(".") + 1
    parts: dict[str, str] = {}
    for name in sorted(names):
        words = name.split(".")
        for i in range(max(1, len(words) - length + 1)):
            parts.setdefault(".".join(words[i : i + length]), name)
    close = difflib.get_close_matches(spelt, list(parts), n=2, cutoff=0.5)
    return f"the nearest: {', '.join(dict.fromkeys(parts[part] for part in close))}" if close else "see `acemerge plan`"


def same_models(labels: Sequence[str], folders: Sequence[tuple[Path, ...]]) -> list[str]:
    """Experts that are one model, by the folders that each is read from."""
    first: dict[tuple[Path, ...], str] = {}
    found = []
    for label, paths in zip(labels, folders, strict=True):
        model = tuple(map(files.resolve, paths))
        if model in first:
            found.append(f"experts {first[model]} and {label} are one model, which counts twice; leave one out")
        first.setdefault(model, label)
    return found
