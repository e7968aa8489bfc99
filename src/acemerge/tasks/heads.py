"""Where a task's head is: beside the merged model, in the expert's own checkpoint, or in the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import HEADS, is_head
from acemerge.checkpoints.folder import Checkpoint, read_stored
from acemerge.checkpoints.header import read_header
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError
from acemerge.shapes import Tensor


@dataclass(frozen=True)
class HeadSource:
    """One place that heads are read from; `name` is shown."""

    name: str
    tensors: Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Heads:
    """The places to look for a task's head, the first before the next."""

    task: str
    sources: tuple[HeadSource, ...]

    def find(self, name: str) -> tuple[Tensor, str] | None:
        """The tensor and where it is from."""
        for source in self.sources:
            if name in source.tensors:
                return source.tensors[name](), source.name
        return None

    def need(self, name: str) -> tuple[Tensor, str]:
        found = self.find(name)
        if found is None:
            looked = ", ".join(source.name for source in self.sources) or "nowhere"
            cure = "name the task's `expert:`, or the file in heads/ by `head:`"
            raise CheckpointError(f"task {self.task}", f"no tensor {name!r} for its head (looked in {looked})", cure)
        return found


def find_heads(task: str, label: str, model: Checkpoint, expert: Checkpoint | None, asked_for: bool = False) -> Heads:
    """Look in the model's `heads/LABEL.safetensors`, else in the expert's checkpoint, then in the model itself.

    Where the task file names the head itself, it has to be among those that the model has, if it has any.

    With a file of its own, a merged model is taken as it was merged: what of a head the experts share in shape (the
    dense layer before the last) is in the model, and nothing is the expert's.
    """
    beside = _beside(model.path, label)
    there = _labels(model.path) if asked_for and beside is None else []
    if there:
        what = f"the model has no {HEADS}/{label}.safetensors"
        raise CheckpointError(f"task {task}", what, f"write `head:` as one of: {', '.join(there)}")
    sources = [] if beside is None else [beside]
    if beside is None and expert is not None:
        of_expert = _beside(expert.path, label)  # an adapter's, whose base has no such head
        sources += [] if of_expert is None else [of_expert]
        sources.append(_of_checkpoint(f"expert {expert.path.name}", expert))
    return Heads(task, (*sources, _of_checkpoint("the model itself", model)))


def _beside(model: Path, label: str) -> HeadSource | None:
    root, name = files.resolve(model), f"{HEADS}/{label}.safetensors"
    if files.kind(root / name) != "file":
        return None
    infos = read_header(contained(root, name))  # refuses what breaks the format
    return HeadSource(name, {info.spec.name: partial(read_stored, info) for info in infos})


def _labels(model: Path) -> list[str]:
    """Of the heads beside a model."""
    folder = files.resolve(model) / HEADS
    names = files.list_folder(folder) if files.kind(folder) == "folder" else []
    return sorted(Path(name).stem for name in names if is_head(f"{HEADS}/{name}"))


def _of_checkpoint(name: str, checkpoint: Checkpoint) -> HeadSource:
    return HeadSource(name, {key: partial(checkpoint.read, key) for key in checkpoint.tensors})
