"""Rules side by side for their scores alone: what they merge is in memory as far as there is room, and not kept."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path

import torch

from acemerge.api import run_together
from acemerge.checkpoints import files, machine
from acemerge.engine.opening import Opened, open_recipes
from acemerge.engine.run_options import RunOptions
from acemerge.evaluation.adapters import as_model
from acemerge.evaluation.evaluate import Run, evaluate, rows_of
from acemerge.evaluation.tables import Evaluation, Row
from acemerge.recipes.recipe import Recipe
from acemerge.tasks.networks import open_model

# What is left free beside all that is foreseen, for activations and libraries: at least so much, and so large a part.
_LEAST, _PART = 1 << 30, 10


@dataclass(frozen=True)
class Unkept:
    """Recipes whose merges are scored and removed. They lie in a folder in memory; in one in OUT where there is no such
    folder, or too little memory for one model.
    """

    recipes: Mapping[str, Recipe]
    out: Path
    options: RunOptions
    tell: Callable[[str], None]

    def evaluate(self, models: Mapping[str, str], run: Run) -> Evaluation:
        """The scores of the models, and of each recipe as if its merge had been kept. All are planned before the first
        score, and as many are merged in one pass over the files as fit in memory.
        """
        folder = f"acemerge-scores-{secrets.token_hex(8)}"
        planned = [(recipe, self.out / folder / name) for name, recipe in self.recipes.items()]
        opened = dict(zip(self.recipes, open_recipes(planned, self.options), strict=True))
        found = evaluate(models, run)
        rows: dict[str, Row] = {}
        # Those that want data go by themselves, see `run_together`.
        left = sorted(opened, key=lambda name: bool(opened[name].calibration))
        while left:
            fitting = _fitting([opened[name] for name in left])
            place = machine.folder_in_memory() if fitting else None
            names, left = left[: fitting or 1], left[fitting or 1 :]
            with _removed((place or self.out) / folder) as home:
                rows |= self._scored({name: opened[name] for name in names}, home, run)
                gc.collect()  # the harness, say, may leave a network in a cycle, and what it was loaded from
        return replace(found, rows=(*found.rows, *(rows[name] for name in self.recipes)))

    def _scored(self, opened: Mapping[str, Opened], home: Path, run: Run) -> dict[str, Row]:
        for name in opened:
            self.tell(f"merging by {name}")
        run_together([(one, home / name) for name, one in opened.items()], replace(self.options, resume=True))
        whole = {name: as_model(str(home / name), run.base, home, run.quiet) for name in opened}
        models = {name: open_model(path, run.device, run.quiet) for name, path in whole.items()}
        return {row.name: row for row in rows_of(models, run)}


def _fitting(opened: Sequence[Opened]) -> int:
    """How many of these, from the first, fit in memory at once beside a network, or beside what merges them.

    What a rule measures on data may be larger than the model, and goes to the disk.
    """
    place, free = machine.folder_in_memory(), machine.free_memory()
    if place is None or free is None:
        return 0
    network = sum(spec.count for spec in opened[0].base.tensors.values()) * torch.float32.itemsize
    beside = max(network, *(one.budget for one in opened)) + max(_LEAST, free // _PART)
    room = min(free - beside, files.free_bytes(place) or 0)
    sizes = accumulate(_nbytes(one) for one in takewhile(lambda one: not one.calibration, opened))
    return sum(size <= room for size in sizes)


def _nbytes(opened: Opened) -> int:
    """Of an output; of an adapter, with the model that is made of it to be scored."""
    masks = sum(spec.nbytes for specs in opened.layout.masks.values() for spec in specs)
    whole = sum(spec.nbytes for spec in opened.base.tensors.values()) if opened.plan.is_adapter else 0
    return opened.plan.bytes_written + masks + whole


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[Path]:
    """A new folder that nobody else may look into, removed at the end with the folders that were made for it."""
    made = [path for path in folder.parents if files.kind(path) == "nothing"]
    try:
        with files.writing(folder):
            os.makedirs(folder, mode=0o700)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # where an interrupt came meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                files.remove_folder(path)
