"""Does an expert come from this base at all? A look at some rows of some layers, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.reader import Reader, Span
from acemerge.errors import CheckpointError
from acemerge.planning.jobs import ByRule, Plan, is_whole
from acemerge.shapes import Float, Tensor

# Layers and entries of each that are looked at: 1,000 entries of two unrelated models have a cosine of 0 +- 0.03.
_LAYERS = 8
_ENTRIES = 1 << 16
# Fine-tuning leaves a cosine of 0.9 and more; a model trained for itself has one near zero.
_LEAST_COSINE = 0.1
_MOST_CHANGE = 0.5


@dataclass(frozen=True)
class Relation:
    """How near an expert is to the base: `cosine` of their weights, `change` relative to the base's norm."""

    label: str
    cosine: float
    change: float

    @property
    def is_stranger(self) -> bool:
        """Whether the expert's layers have nothing of the base's."""
        return self.cosine < _LEAST_COSINE and self.change > _MOST_CHANGE

    @property
    def figures(self) -> str:
        return f"cosine {self.cosine:.2f}, difference {self.change:.2f} times the base's norm"


def relations(plan: Plan, base: Checkpoint, experts: Sequence[Checkpoint]) -> Iterator[Relation]:
    """Over the first rows of some layers: `<W_t, W_0> / (||W_t|| ||W_0||)` and `||W_t - W_0|| / ||W_0||`.

    Zeros alone tell nothing, and an adapter has no layers to compare: these experts are passed over. So are all where
    a recipe puts layers together that were not one in a common base.
    """
    if plan.recipe.slices:
        return
    sampled: dict[tuple[str, ...], Tensor] = {}
    for i, expert in enumerate(experts):
        jobs = _layers(plan, i) if is_whole(expert) else []
        if not jobs:
            continue
        names = tuple(job.name for job in jobs)
        W0 = sampled.setdefault(names, _sample(base, jobs, names)) if names not in sampled else sampled[names]
        Wt = _sample(expert, jobs, [job.sources[i] for job in jobs])
        norms = (W0.norm() * Wt.norm()).item()
        if not norms > 0 or norms == float("inf"):  # the merge itself tells what is not finite, and where
            continue
        yield Relation(plan.experts[i], (W0 @ Wt).item() / norms, ((Wt - W0).norm() / W0.norm()).item())


def check_related(plan: Plan, base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """CheckpointError with the figures for an expert whose layers have nothing of the base's."""
    for relation in relations(plan, base, experts):
        if relation.is_stranger:
            what = f"does not come from this base: {relation.figures}"
            cure = "name its own base, or merge all the same with --force"
            raise CheckpointError(f"expert {relation.label}", what, cure)


def _layers(plan: Plan, expert: int) -> list[ByRule]:
    """Some layers from everywhere in the model, that an expert has."""
    layers = [job for job in plan.ruled if job.role.name in ("linear", "conv1d")]
    layers = [job for job in layers if job.spec.count and job.sources[expert]]
    return layers[:: -(-len(layers) // _LAYERS) or 1]


def _sample(checkpoint: Checkpoint, jobs: Sequence[ByRule], names: Sequence[str]) -> Float[Tensor, " n"]:
    """The first rows of these tensors, one behind the other, in float64."""
    spans = []
    for job, name in zip(jobs, names, strict=True):
        rows = job.spec.shape[0]
        spans.append(Span(name, (0, min(rows, max(1, _ENTRIES * rows // max(1, job.spec.count))))))
    reader = Reader(checkpoint)
    try:
        places = reader.places(spans)
        found = reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
        return torch.cat([stored.tensor().double().flatten() for stored in found])
    finally:
        reader.close()
