"""What a pack names: a base and its experts by their Hub ids, rules with their parameters, tasks, published scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from acemerge.errors import UsageError, nearest
from acemerge.evaluation.tables import EXPERTS
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.recipes.tables import Strict
from acemerge.recipes.yaml_file import read_yaml
from acemerge.tasks.task_file import Tasks

PACKS = ("vit", "roberta", "gpt2", "llama")
BASE, MEAN, OF_EXPERTS = "base", "mean", "of experts"
_FOLDER = Path(__file__).parent / "packs"


class Reference(Strict):
    """Where a number was published, and what is to be known of it."""

    title: str
    url: str
    note: str


class Published(Strict):
    """Scores in percent that a source has for one row of the table; `size` where it is of one size of model only."""

    source: str
    row: str
    size: str | None = None
    scores: Mapping[str, float]


class Pack(Strict):
    """One experiment. `rules` are changes of `recipe` by the rule's name; an expert's own task has its name.

    In ids and notes `{size}` stands for what `sizes` says of the chosen size, the first where none is chosen.
    """

    title: str
    sizes: Mapping[str, str] = {}
    recipe: Mapping[str, Any]
    experts: Mapping[str, str]
    rules: Mapping[str, Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]
    sources: Mapping[str, Reference] = {}
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> Pack:
        tasks = {task["name"] for task in self.tasks}
        assert set(self.experts) <= tasks
        for found in self.published:
            assert found.source in self.sources
            assert found.row in {EXPERTS, BASE, *self.rules}
            assert found.size is None or found.size in self.sizes
            assert found.scores.keys() <= {*tasks, MEAN, OF_EXPERTS}
        return self

    @property
    def base(self) -> str:
        return str(self.recipe["base"])

    @property
    def models(self) -> list[str]:
        """The ids of the base and of every expert."""
        return [self.base, *self.experts.values()]

    @property
    def task_names(self) -> list[str]:
        return [str(task["name"]) for task in self.tasks]


def load_pack(name: str, size: str | None) -> Pack:
    """A pack of one size. UsageError for a name or size that there is none of."""
    if name not in PACKS:
        raise UsageError(f"pack {name}", "there is no such pack", nearest(name, list(PACKS)))
    whole = Pack.model_validate(read_yaml(_FOLDER / f"{name}.yaml", "pack", "`title:`"))
    if size is not None and size not in whole.sizes:
        cure = nearest(size, list(whole.sizes)) if whole.sizes else "leave --size out"
        raise UsageError(f"--size {size}", f"pack {name} has no such size", cure)
    if not whole.sizes:
        return whole
    chosen = size or next(iter(whole.sizes))
    content = _filled(whole.model_dump(), whole.sizes[chosen])
    published = [row for row in content["published"] if row["size"] in (None, chosen)]
    return Pack.model_validate(content | {"sizes": {chosen: whole.sizes[chosen]}, "published": published})


def _filled(value: Any, size: str) -> Any:
    if isinstance(value, str):
        return value.replace("{size}", size)
    if isinstance(value, Mapping):
        return {key: _filled(part, size) for key, part in value.items()}
    return [_filled(part, size) for part in value] if isinstance(value, list | tuple) else value


def chosen_of(known: Sequence[str], asked: str | None, what: str) -> list[str]:
    """The names of `--methods` or `--tasks`, all that are known without it; UsageError for one that is not."""
    if asked is None:
        return list(known)
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--{what}", f"the pack has no {name!r}", nearest(name, list(known)))
    return list(dict.fromkeys(names))


def recipes_of(pack: Pack, rules: Sequence[str], places: Mapping[str, str]) -> dict[str, Recipe]:
    """A recipe for each rule. `places` says of every id in the pack what is read for it."""
    experts = [places[model] for model in pack.experts.values()]
    shared = {**pack.recipe, "base": places[pack.base], "experts": experts}
    return {name: make_recipe({**shared, **pack.rules[name]}, f"rule {name}") for name in rules}


def tasks_of(
    pack: Pack, names: Sequence[str], places: Mapping[str, str], data: Mapping[str, str], limit: int | None
) -> Tasks:
    """The named tasks, each with its expert and that one's head. `data` is the folder of each task's examples."""
    labels = dict(zip(pack.experts, expert_labels(list(pack.experts.values())), strict=True))
    content = []
    for task in pack.tasks:
        name = str(task["name"])
        if name not in names:
            continue
        changed = {**task, "data": data[name], "subset": None, "limit": limit}
        if name in pack.experts:
            changed |= {"expert": places[pack.experts[name]], "head": labels[name]}
        if task["kind"] == "zero_shot":
            changed["clip"] = places[pack.base]
        content.append(changed)
    return Tasks.model_validate({"tasks": content})
