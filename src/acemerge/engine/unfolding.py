"""A tensor between its two forms: as it is stored, and as the rule sees it, turned or as a layer of patches."""

from __future__ import annotations

from acemerge.planning.jobs import ByRule
from acemerge.shapes import Float, Tensor


def as_seen(job: ByRule, values: Float[Tensor, "*stored"]) -> Float[Tensor, "*seen"]:
    """Values of the tensor, or a stack of them, as the rule sees them; of a piece too where it may be one."""
    if job.groups:
        values = values.reshape(*values.shape[: values.ndim - len(job.spec.shape)], *job.unfolded)
    return values.mT if job.transposed else values


def as_stored(job: ByRule, values: Float[Tensor, "*seen"]) -> Float[Tensor, "*stored"]:
    """What `as_seen` was given."""
    values = values.mT if job.transposed else values
    if job.groups:
        values = values.reshape(*values.shape[: values.ndim - len(job.unfolded)], *job.spec.shape)
    return values
