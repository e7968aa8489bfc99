"""What the papers look at, of any merge: one pass over all layers, one in memory at a time, nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from acemerge.calibration.calibrate import Calibrating, calibrated
from acemerge.engine.applying import apply
from acemerge.engine.compute import SameInfinitiesError, task_vectors
from acemerge.engine.execute import OnProgress, walker
from acemerge.engine.factored import merge_factors_of
from acemerge.engine.opening import Opened
from acemerge.engine.thresholds import counting, with_thresholds
from acemerge.engine.unfolding import as_seen
from acemerge.engine.work import Loaded, Measured, Place, Setting, Values, Work
from acemerge.inspection.look_back import before_refinement
from acemerge.linalg.gram import energies, symmetric_product
from acemerge.linalg.principal import Principal, first_cosines, matrix_cosine, overlaps, principal
from acemerge.methods import Method, make
from acemerge.methods.ace import Ace, heterogeneity
from acemerge.methods.least_squares_rule import source_of
from acemerge.methods.stats import LayerStats
from acemerge.planning.jobs import Merge
from acemerge.planning.pieces import Piece
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.shapes import Float, Tensor

# Rules to count memory by: singular vectors of full task vectors, whatever adapters are given by, without and with the
# experts' second moments.
_SPECTRAL, _MEASURED = (make("svc", {"over": over}) for over in ("breadcrumbs", "regmean"))


@dataclass(frozen=True)
class Spectrum:
    """Singular values, see `Principal`, and the share of the energy in the top 5 % of them, None where all is zero."""

    values: Float[Tensor, " n"]
    share: float | None


@dataclass(frozen=True)
class Directions:
    """Between T experts, of their principal directions on one side of a layer.

    `first` (T, T) are the cosines of the first ones, without their signs; `overlap` (T, T) is that of the spaces of
    the top 5 %, see `overlaps`. NaN where an expert has no update.
    """

    first: Float[Tensor, "T T"]
    overlap: Float[Tensor, "T T"]


@dataclass(frozen=True)
class Covariances:
    """Cosines of each expert's true input second moment `Z_t^T Z_t / N` with what stands in for it; `matrix_cosine`.

    `updates` is `D_t^T D_t`, `rule` the rule's own estimate, `nothing` the identity, which takes no look at the expert.
    None for an expert without an update, and of `rule` where it makes no such estimate.
    """

    updates: tuple[float | None, ...]
    rule: tuple[float | None, ...]
    nothing: tuple[float | None, ...]


@dataclass(frozen=True)
class LayerAnalysis:
    """One matrix (out, in), as the rule sees it, and what the rule said of it in `stats`.

    `energies` (T,) and `own` are the experts'; one that is left out here counts as one without an update. `merged` is
    the merged update, `before` the same before refinement, where the rule refined it. `covariances` is there where the
    layer's inputs were measured.
    """

    name: str
    role: str
    shape: tuple[int, int]
    energies: Float[Tensor, " T"]
    own: tuple[Spectrum, ...]
    merged: Spectrum
    before: Spectrum | None
    inputs: Directions
    outputs: Directions
    covariances: Covariances | None
    stats: LayerStats

    @property
    def gamma(self) -> float | None:
        """ACE's heterogeneity over the experts that changed it; None for fewer than two."""
        return heterogeneity(self.energies[self.energies > 0])


@dataclass(frozen=True)
class Analysis:
    """All matrices that a rule merges, in the model's order; `tau` is where ACE's heterogeneous branch begins."""

    base: str
    experts: tuple[str, ...]
    rule: str
    tau: float
    layers: tuple[LayerAnalysis, ...]

    @property
    def gamma(self) -> float | None:
        """The heterogeneity of the experts' energies over all layers together."""
        n = sum((layer.energies for layer in self.layers), torch.zeros(len(self.experts), dtype=torch.float64))
        return heterogeneity(n[n > 0])


def with_data(recipe: Recipe) -> Recipe:
    """The recipe by `regmean`, which has every layer's inputs measured on the recipe's calibration data."""
    return make_recipe({**recipe.model_dump(), "method": {"name": "regmean"}}, "calibration")


def analyse(
    opened: Opened, workers: int, on_progress: OnProgress = lambda _: None, data: Opened | None = None
) -> Analysis:
    """Merge every matrix by its rule, and look at what goes in, what comes out and how it was solved.

    `data` is the same opened by the recipe `with_data`, for true input second moments. Raises what a merge raises:
    CheckpointError for what is not finite, NumericalError for what cannot be solved.
    """
    plan = opened.plan
    jobs = {job.name: job for job in plan.merged if job.is_matrix}
    tau = next((job.method.tau for job in jobs.values() if isinstance(job.method, Ace)), Ace().tau)
    found: list[LayerAnalysis] = []
    counted = _SPECTRAL if data is None else _MEASURED
    with opened.pipeline(workers, hashing=False) as (pipeline, _), TemporaryDirectory() as folder:

        def measured(which: Opened, setting: Setting) -> Setting:
            walk = walker(pipeline, "calibration", on_progress)
            given = which.plan, which.calibration, which.devices[0]
            return calibrated(setting, Calibrating(*given, Path(folder), {}, walk, on_progress))

        count = counting(opened.setting, walker(pipeline, "thresholds", on_progress))
        setting = with_thresholds(opened.setting, plan, count)
        setting = measured(opened, setting)  # what the rules themselves want
        true = None if data is None else measured(data, data.setting).measured
        parts = (Piece(replace(job, method=_counted(job, counted, len(plan.experts)))) for job in jobs.values())
        for layers in walker(pipeline, "analyse", on_progress)(parts, _looking(jobs, setting, true)):
            found += layers
    return Analysis(plan.recipe.base, plan.experts, plan.recipe.method.name, tau, tuple(found))


def _counted(job: Merge, spectral: Method, experts: int) -> Method:
    """The rule that takes more memory: the layer's own, or one of singular vectors."""
    if job.factored:
        return spectral
    _, rows, columns = job.matrices
    return max(spectral, job.method, key=lambda rule: rule.needs.work.entries(experts, rows, columns))


def _looking(jobs: Mapping[str, Merge], setting: Setting, true: Measured | None) -> Work[Merge, list[LayerAnalysis]]:
    def work(loaded: Loaded[Merge], place: Place) -> list[LayerAnalysis]:
        found = []
        for piece, values in loaded:
            with contextlib.suppress(SameInfinitiesError):  # a mask, which has no update
                found += _layers(piece, jobs[piece.job.name], values, setting, true, place)
        return found

    return work


def _layers(
    piece: Piece[Merge], job: Merge, values: Values, setting: Setting, true: Measured | None, place: Place
) -> list[LayerAnalysis]:
    """One for a matrix, one for each of a stack."""
    T = len(setting.labels)
    with place.space((T + 1, *piece.shape), job.compute_dtype) as space:
        W0 = space[T].copy_(values.take((0, job.name)))
        made = _of_factors(job, values, setting, place) if job.factored else None  # before they are let go of
        deltas, _, used = task_vectors(piece, values, setting, W0, space[:T])
        made = made or _of_updates(job, deltas, W0, used, setting)
        inputs = None if true is None else true.of("inputs", job.name, used)
        moments = None if inputs is None else inputs.to(deltas.device).reshape(len(used), -1, *inputs.shape[-2:])
        found = []
        for i, (name, D, m) in enumerate(_matrices(job, deltas, made)):
            covariances = None if moments is None else _covariances(job.method, D, moments[:, i], used, T)
            found.append(_layer(name, job.role.name, D, m, used, T, covariances))
        return found


@dataclass(frozen=True)
class _Made:
    """The merged update, the same before refinement where the rule refined it, and what the rule said."""

    merged: Float[Tensor, "*shape"]
    before: Float[Tensor, "*shape"] | None
    stats: LayerStats


def _of_updates(job: Merge, deltas: Tensor, W0: Tensor, used: Sequence[int], setting: Setting) -> _Made:
    result = apply(job, deltas, W0, used, setting)
    earlier = before_refinement(job, result.stats)
    before = None if earlier is None else apply(earlier, deltas, W0, used, setting).delta
    return _Made(result.delta, before, result.stats)


def _of_factors(job: Merge, values: Values, setting: Setting, place: Place) -> _Made:
    """As a merge makes it where all experts give the factors of their updates."""
    update, record = merge_factors_of(job, values, setting, place.device)
    if update is None:
        nothing = torch.zeros(job.spec.shape, dtype=job.compute_dtype, device=place.device)
        return _Made(nothing, None, record.stats)
    earlier = before_refinement(job, update.stats)
    before = None if earlier is None else merge_factors_of(earlier, values, setting, place.device)[0]
    return _Made(update.delta(), None if before is None else before.delta(), update.stats)


def _matrices(job: Merge, deltas: Tensor, made: _Made) -> Iterator[tuple[str, Float[Tensor, "T out in"], _Made]]:
    """The matrices of a tensor as the rule saw them: names, task vectors and what was made of them."""

    def stacked(X: Tensor, before: int) -> Tensor:  # one axis for what is between these axes and (out, in)
        turned = as_seen(job, X)
        return turned.reshape(*turned.shape[:before], -1, *turned.shape[-2:])

    own, merged = stacked(deltas, 1), stacked(made.merged, 0)
    before = [None] * len(merged) if made.before is None else stacked(made.before, 0)
    for i, stats in enumerate(made.stats.slices or [made.stats] * len(merged)):
        name = job.name if len(job.unfolded) == 2 else f"{job.name}[{i}]"
        yield name, own[:, i], _Made(merged[i], before[i], stats)


def _covariances(
    method: Method,
    deltas: Float[Tensor, "T out in"],
    moments: Float[Tensor, "T in in"],
    used: Sequence[int],
    experts: int,
) -> Covariances:
    columns: list[list[float | None]] = [[None] * experts for _ in range(3)]
    eye = torch.eye(deltas.shape[2], dtype=torch.float64, device=deltas.device)
    for t, D, G in zip(used, deltas, moments, strict=True):
        own = source_of(method, D)
        columns[0][t] = matrix_cosine(symmetric_product(D), G)
        columns[1][t] = None if own is None else matrix_cosine(symmetric_product(own), G)
        columns[2][t] = matrix_cosine(eye, G) if D.any() else None
    updates, rule, nothing = map(tuple, columns)
    return Covariances(updates, rule, nothing)


def _layer(
    name: str,
    role: str,
    deltas: Float[Tensor, "T out in"],
    made: _Made,
    used: Sequence[int],
    experts: int,
    covariances: Covariances | None,
) -> LayerAnalysis:
    out_features, in_features = deltas.shape[1:]
    n = torch.zeros(experts, dtype=torch.float64).index_copy(0, torch.tensor(used), energies(deltas).cpu())
    nothing = torch.zeros(0, dtype=torch.float64)
    left_out = Principal(nothing, nothing.expand(out_features, 0), nothing.expand(in_features, 0), 0, 0.0)
    found = dict(zip(used, map(principal, deltas), strict=True))
    own = [found.get(t, left_out) for t in range(experts)]
    inputs, outputs = [p.right for p in own], [p.left for p in own]
    return LayerAnalysis(
        name,
        role,
        (out_features, in_features),
        n,
        tuple(map(_spectrum, own)),
        _spectrum(principal(made.merged)),
        None if made.before is None else _spectrum(principal(made.before)),
        Directions(first_cosines(inputs), overlaps(inputs)),
        Directions(first_cosines(outputs), overlaps(outputs)),
        covariances,
        made.stats,
    )


def _spectrum(found: Principal) -> Spectrum:
    return Spectrum(found.values, found.share)
