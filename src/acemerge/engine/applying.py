"""A rule on a tensor as it is stored: turned, unfolded, slice by slice, projection by projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from acemerge.engine.unfolding import as_seen, as_stored
from acemerge.engine.work import Setting
from acemerge.linalg.known import Known
from acemerge.methods import Layer, LayerResult, Method
from acemerge.methods.stats import of_projections, of_slices
from acemerge.models.projections import Fused
from acemerge.planning.jobs import ByRule, Merge
from acemerge.shapes import Float, Tensor


def apply(
    job: ByRule, deltas: Tensor, W0: Tensor, used: Sequence[int], setting: Setting, known: Known | None = None
) -> LayerResult:
    """The rule's result for this tensor, stored as the tensor is; `known` has what others made of its task vectors."""
    layer = replace(rule_layer(job, used, setting, as_seen(job, W0)), known=known)
    seen = as_seen(job, deltas)
    if isinstance(job, Merge) and job.fused:
        result = _by_projection(job.method, job.fused, seen, layer)
    else:
        result = apply_rule(job.method, seen, layer)
    masks = None if result.masks is None else as_stored(job, result.masks)
    return LayerResult(as_stored(job, result.delta), result.stats, masks)


def rule_layer(job: ByRule, used: Sequence[int], setting: Setting, W0: Tensor) -> Layer:
    """What the job's rule may know of its layer; `W0` as the rule sees it. UsageError for experts it cannot take."""
    layer = setting.layer(job, used, W0.device)
    return replace(layer, base=W0) if job.method.needs.wants_base else layer


def apply_rule(method: Method, deltas: Float[Tensor, "T *shape"], layer: Layer) -> LayerResult:
    """The rule on a tensor of any shape: stacks of matrices go through a matrix rule slice by slice."""
    if not method.needs.matrix or deltas.ndim == 3:
        return method.merge(deltas, layer)
    results = [method.merge(deltas[:, i], layer.part(i)) for i in range(deltas.shape[1])]
    return LayerResult(torch.stack([r.delta for r in results]), of_slices([r.stats for r in results]))


def _by_projection(method: Method, fused: Fused, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
    """The rule on each of the projections that share a weight."""
    bases = fused.split(layer.base) if layer.base is not None else [None] * len(fused.split(deltas))
    results = [
        method.merge(part, replace(layer, base=base)) for part, base in zip(fused.split(deltas), bases, strict=True)
    ]
    return LayerResult(fused.join([r.delta for r in results]), of_projections([r.stats for r in results]))
