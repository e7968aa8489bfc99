"""A look at experts before they are merged: one pass over all tensors, a layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from acemerge.engine.compute import SameInfinitiesError, task_vectors
from acemerge.engine.execute import OnProgress, merging, walker
from acemerge.engine.opening import Opened
from acemerge.engine.relatedness import relations
from acemerge.engine.unfolding import as_seen
from acemerge.engine.work import Loaded, Place, Setting, Values, Walk, Work
from acemerge.inspection.advice import Advice, of_directions, of_energies, of_masks, of_origin, of_steps
from acemerge.inspection.statistics import Sums, nothing, squared_norms, stable_ranks, sums
from acemerge.methods import make
from acemerge.methods.ace import Ace, heterogeneity
from acemerge.methods.kron_auto import KronAuto
from acemerge.methods.trust import Trust
from acemerge.planning.finite import check_finite
from acemerge.planning.jobs import Job, Merge
from acemerge.planning.pieces import Piece, pieces
from acemerge.shapes import Float, Tensor

# A rule to count memory by: one that looks at full task vectors, entry by entry, whatever adapters are given by.
FULL = make("breadcrumbs", {})


@dataclass(frozen=True)
class View:
    """One tensor's task vectors. `squared_norms` (T,) are there for the weights of layers alone, see `is_matrix`."""

    job: Merge
    sums: Sums
    squared_norms: Float[Tensor, " T"] | None

    @property
    def gamma(self) -> float | None:
        """ACE's heterogeneity over the experts that changed it; None for fewer than two."""
        n = self.sums.energies
        return heterogeneity(n[n > 0])

    @property
    def stable_ranks(self) -> list[float | None] | None:
        if self.squared_norms is None:
            return None
        return numbers(stable_ranks(self.sums.energies, self.squared_norms))

    def leader(self, labels: Sequence[str]) -> str | None:
        """The expert with the largest update."""
        n = self.sums.energies
        return labels[int(n.argmax())] if n.any() else None

    def lowest_cosine(self, labels: Sequence[str]) -> tuple[str, str]:
        """Between two experts, and their names, as text."""
        cosines = self.sums.cosines
        pairs = [(float(cosines[s, t]), s, t) for s, t in combinations(range(len(labels)), 2)]
        lowest = min((pair for pair in pairs if math.isfinite(pair[0])), default=None)
        return ("-", "-") if lowest is None else (f"{lowest[0]:.2f}", f"{labels[lowest[1]]}, {labels[lowest[2]]}")

    def table(self, labels: Sequence[str]) -> dict[str, Any]:
        """As `--json` has it."""
        return {
            "name": self.job.name,
            "shape": list(self.job.spec.shape),
            "role": self.job.role.name,
            "rule": self.job.rule,
            "energies": self.sums.energies.tolist(),
            "distances": numbers(self.sums.distances),
            "stable_ranks": self.stable_ranks,
            "cosines": [numbers(row) for row in self.sums.cosines],
            "cancelled": self.sums.cancelled,
            "added_beside_base": number(self.sums.added_beside_base),
            "added_beside_orthogonal": number(self.sums.added_beside_orthogonal),
            "gamma": self.gamma,
            "dominating": self.leader(labels),
        }


@dataclass(frozen=True)
class Inspection:
    """What was seen of every tensor that a rule will merge; `passed_over` are those whose rows are matched by token."""

    base: str
    experts: tuple[str, ...]
    views: tuple[View, ...]
    passed_over: tuple[str, ...]
    advice: tuple[Advice, ...]

    @cached_property
    def total(self) -> Sums:
        """Over all tensors."""
        return sum((view.sums for view in self.views), nothing(len(self.experts)))

    @cached_property
    def stable_ranks(self) -> list[float | None]:
        """Every expert's median over the layers that it changed; None where there is none."""
        rows = [view.stable_ranks for view in self.views if view.squared_norms is not None]
        columns = ([rank for row in rows if row and (rank := row[t]) is not None] for t in range(len(self.experts)))
        return [sorted(column)[len(column) // 2] if column else None for column in columns]

    @property
    def farthest(self) -> list[View]:
        """The layers that the experts, added, would move, the farthest beside their weights first."""
        found = [view for view in self.views if view.squared_norms is not None and view.sums.added > 0]
        return sorted(found, key=lambda view: -view.sums.added_beside_base)

    @property
    def in_conflict(self) -> list[View]:
        """The layers that lose most when the experts are added, those that lose anything."""
        found = [view for view in self.views if view.squared_norms is not None and view.sums.cancelled > 0]
        return sorted(found, key=lambda view: -view.sums.cancelled)

    def table(self) -> dict[str, Any]:
        """As `--json` has it."""
        total = self.total
        facts = zip(
            self.experts,
            total.energies.tolist(),
            total.shares.tolist(),
            numbers(total.distances),
            self.stable_ranks,
            total.cosines,
            strict=True,
        )
        return {
            "base": self.base,
            "experts": [
                {
                    "name": label,
                    "energy": energy,
                    "share": share,
                    "distance": distance,
                    "stable_rank": rank,
                    "cosines": dict(zip(self.experts, numbers(cosines), strict=True)),
                }
                for label, energy, share, distance, rank, cosines in facts
            ],
            "layers": [view.table(self.experts) for view in self.views],
            "passed_over": list(self.passed_over),
            "warnings": [{"what": advice.what, "cure": advice.cure} for advice in self.advice],
        }


def survey(opened: Opened, workers: int, on_progress: OnProgress = lambda _: None) -> Inspection:
    """Read every tensor once and look at the task vectors; experts count as they are, without their weights.

    Raises CheckpointError for what is not finite, unless the recipe leaves such experts out.
    """
    plan = opened.plan
    jobs = {job.name: job for job in plan.merged}
    # A matrix is seen whole for its norm; whether an expert is left out is only known when all was seen.
    split = plan.recipe.nonfinite == "error"
    views: dict[str, View] = {}
    masks: dict[str, None] = {}
    with opened.pipeline(workers, hashing=False) as (pipeline, _):
        walk = walker(pipeline, "inspect", on_progress)
        whole = (replace(job, method=FULL) for job in jobs.values())
        parts = (piece for job in whole for piece in pieces(job, split and not job.is_matrix))
        for seen in walk(parts, _looking(opened.setting)):
            for name, view in seen:
                if view is None:
                    masks[name] = None
                else:
                    views[name] = replace(view, sums=view.sums + views[name].sums) if name in views else view
        _check_rest(opened, [job for job in plan.jobs if job.name not in jobs], walk)
    found = tuple(replace(view, job=jobs[name]) for name, view in views.items())
    passed_over = tuple(job.name for job in plan.by_token)
    seen_all = Inspection(plan.recipe.base, plan.experts, found, passed_over, ())
    return replace(
        seen_all,
        advice=(*_advice(opened, seen_all), *of_masks(sorted(masks, key=lambda name: not jobs[name].is_matrix))),
    )


def _check_rest(opened: Opened, rest: Sequence[Job], walk: Walk) -> None:
    """Find what a merge would refuse in what no task vectors are looked at of: kept tensors, rows by token, heads."""
    for _ in walk((piece for job in rest for piece in pieces(job, job.entrywise)), merging(opened.setting)):
        pass
    for expert, label, heads in zip(opened.experts, opened.plan.experts, opened.plan.heads, strict=True):
        for head in heads:
            value = expert.read(head.spec.name)
            if value.dtype.is_floating_point:
                check_finite(value, head.spec.name, f"expert {label}")


def _looking(setting: Setting) -> Work[Merge, list[tuple[str, View | None]]]:
    def work(loaded: Loaded[Merge], place: Place) -> list[tuple[str, View | None]]:
        return [(piece.job.name, _view_unless_mask(piece, values, setting, place)) for piece, values in loaded]

    return work


def _view_unless_mask(piece: Piece[Merge], values: Values, setting: Setting, place: Place) -> View | None:
    try:
        return _view(piece, values, setting, place)
    except SameInfinitiesError:
        return None


def _view(piece: Piece[Merge], values: Values, setting: Setting, place: Place) -> View:
    """An expert that is left out here counts as one without an update."""
    job, T = piece.job, len(setting.labels)
    with place.space((T + 1, *piece.shape), job.compute_dtype) as space:
        W0 = space[T].copy_(values.take((0, job.name)))
        deltas, _, used = task_vectors(piece, values, setting, W0, space[:T])
        seen = sums(deltas, W0)
        norms = squared_norms(as_seen(job, deltas)) if job.is_matrix else None
    if len(used) == T:
        return View(job, seen, norms)
    products = torch.zeros(T, T, dtype=torch.float64)
    products[torch.tensor(used)[:, None], torch.tensor(used)] = seen.products
    if norms is not None:
        norms = torch.zeros(T, dtype=torch.float64).index_copy(0, torch.tensor(used), norms)
    return View(job, replace(seen, products=products), norms)


def _advice(opened: Opened, seen: Inspection) -> list[Advice]:
    plan, labels, total = opened.plan, seen.experts, seen.total
    method = plan.recipe.method
    tau = next((job.method.tau for job in plan.ruled if isinstance(job.method, Ace)), Ace().tau)
    gammas = [view.gamma for view in seen.views if view.squared_norms is not None]
    layers = [(view.job.name, view.sums) for view in seen.views if view.squared_norms is not None]
    found = [Advice(warning, "") for warning in plan.warnings]
    found += of_origin(relations(plan, opened.base, opened.experts))
    weights = [expert.weight for expert in plan.recipe.experts]
    found += of_energies(labels, total.energies.tolist(), weights, gammas, tau if method.name == "ace" else None)
    if not any(isinstance(job.method, KronAuto | Trust) for job in plan.ruled):
        found += of_steps(layers)
    return found + of_directions(labels, total, layers)


def numbers(values: Float[Tensor, " T"]) -> list[float | None]:
    """Plain numbers, None for what is not finite."""
    return [number(value) for value in values.tolist()]


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None
