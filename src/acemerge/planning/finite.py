"""What is not finite, going in or coming out, is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from acemerge.errors import CheckpointError, Cure, NumericalError, fetching
from acemerge.planning.jobs import Job
from acemerge.shapes import Float, Tensor

_FETCH = fetching("it again")

DOUBLE = Cure("use --compute-dtype float64", "use compute_dtype='float64'")
_WIDER = Cure("write --dtype bfloat16 or float32", "give a base of bfloat16 or float32, or use a smaller scale")


def cure_of(experts: Sequence[str]) -> Cure:
    """The cure for an expert that is not finite: one of several can be left out."""
    if len(experts) == 1:
        return _FETCH
    out = "or leave the expert out"
    leaving_out = fetching(f"it again, {out} with --nonfinite skip-expert")
    return replace(leaving_out, in_memory=f"{_FETCH.in_memory}, {out}")


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN wins both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_finite(values: Tensor, name: str, where: str, cure: str | Cure = _FETCH, first_row: int = 0) -> None:
    """CheckpointError with the coordinate of the first NaN or infinity; the values begin at `first_row`."""
    if is_finite(values):
        return
    place = (~torch.isfinite(values)).nonzero()[0].tolist()
    value = values[tuple(place)].item()
    what = f"tensor {name!r} is {value} at {[place[0] + first_row, *place[1:]] if place else place}"
    raise CheckpointError(where, what, cure)


def check_energies(n: Float[Tensor, " T"], where: str, dtype: torch.dtype) -> None:
    """NumericalError where updates of finite values in `dtype` have no energy: rules weigh by these, and would take
    the largest of all for nothing.
    """
    if bool(n.isfinite().all()):
        return
    if dtype == torch.float32:
        raise NumericalError(where, "an update is beyond the range of float32", DOUBLE)
    what = "an update is so large that float64 does not hold its square"
    raise NumericalError(where, what, "scale the updates to a size near 1")


def nothing_finite(job: Job) -> CheckpointError:
    """The error where no expert is left to merge."""
    return CheckpointError(f"tensor {job.name!r}", "no expert has finite values", "fetch the experts again")


def rounded(value: Tensor, job: Job, dtype: torch.dtype | None = None) -> Tensor:
    """The value on the CPU, rounded once to `dtype`, or that of the job's output.

    NumericalError for what is not finite, before or after.
    """
    dtype = dtype or job.spec.dtype
    result = value.to(device="cpu", dtype=dtype)
    if value.dtype.is_floating_point and not _fits(value, dtype) and not is_finite(result):
        where = f"tensor {job.name!r}"
        if not is_finite(value):
            cure = "use a smaller scale" if value.dtype == torch.float64 else DOUBLE
            raise NumericalError(where, f"{job.rule} gave values that are not finite", cure)
        largest = value.abs().max().item()
        kind = str(dtype).removeprefix("torch.")
        what = f"its largest magnitude {largest:g} overflows {kind}"
        raise NumericalError(where, what, _WIDER if dtype == torch.float16 else "use a smaller scale")
    return result.contiguous()


def all_rounded(values: Float[Tensor, "P *shape"], jobs: Sequence[Job]) -> list[Tensor]:
    """The same for tensors of one shape and output type."""
    dtype = jobs[0].spec.dtype
    if values.dtype.is_floating_point and not _fits(values, dtype):
        return [rounded(value, job) for value, job in zip(values, jobs, strict=True)]
    return list(values.to(device="cpu", dtype=dtype).contiguous())


def own_memory(value: Tensor, other: Tensor) -> Tensor:
    """The value in memory of its own, not that of `other`, which serves again."""
    shared = value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return value.clone() if shared else value


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are within the range of a type. What is a little beyond may still be rounded into it."""
    if value.numel() == 0:
        return True
    low, high = torch.aminmax(value)  # NaN wins both
    limit = torch.finfo(dtype).max
    return bool(low >= -limit) and bool(high <= limit)
