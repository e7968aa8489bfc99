"""Merging what is in memory of one layer: task vectors, or their factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.errors import CheckpointError, NumericalError, UsageError, shortage_of
from acemerge.linalg.device import with_host
from acemerge.linalg.gram import energies
from acemerge.linalg.lowrank import LowRank
from acemerge.methods import (
    AnyMethod,
    Layer,
    LayerResult,
    LowRankResult,
    Method,
    as_rule,
    check_experts,
    check_weights,
    expert_seeds,
    merge_low_rank,
)
from acemerge.methods.stats import on_host
from acemerge.planning.finite import check_energies, is_finite
from acemerge.shapes import Float, Tensor

Array = Tensor | npt.NDArray[Any]
Arrays = Array | Sequence[Array]


def merge_deltas(
    deltas: Float[Tensor, "T *shape"] | Arrays,
    method: AnyMethod = "auto",
    *,
    weights: Sequence[float] | None = None,
    base: Float[Tensor, "*shape"] | Array | None = None,
    moments: Float[Tensor, "T *moment"] | Arrays | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    **params: Any,
) -> LayerResult:
    """Merge the task vectors `D_t = W_t - W_0` of one layer, (T, out, in), by a rule with `params`.

    `deltas` is a tensor, a numpy array, or a list of either, one for each expert. `method` is a rule's name, a table
    with `name` and its parameters, or an instance of a rule.

    The work is done in `compute_dtype`: float64 for float64 input, else float32 unless given. `base` is `W_0`
    for the rules that merge weights (slerp, karcher), which without it merge the task vectors, and for those that
    ask how large the weights are (kron_auto, trust), which without it go as far as the updates say. `moments` are
    what the rules with data need: input second moments (T, in, in) for regmean, squared gradients (T, out, in) for
    fisher. `seed` is for the rules with chance. The input is never modified. Returns `.delta` (out, in), the rule's
    scale in it, and `.stats`.
    """
    deltas, moments = _stacked("deltas", deltas), None if moments is None else _stacked("moments", moments)
    base = None if base is None else _tensor("base", base)
    if deltas.ndim < 2 or deltas.numel() == 0 or not deltas.dtype.is_floating_point:
        what = f"{deltas.dtype} of shape {list(deltas.shape)}"
        raise UsageError("deltas", what, "give floating-point task vectors of shape (T, out, in), T of 1 or more")
    rule = as_rule(method, params)
    if rule.needs.matrix and deltas.ndim != 3:
        what = f"{rule.name} needs matrices, not shape {list(deltas.shape[1:])}"
        raise UsageError("deltas", what, "give shape (T, out, in) or use an elementwise method")
    _check_base(base, deltas.shape[1:])
    _check_moments(rule, deltas, moments)
    with with_host(deltas.device) as host:
        result = _merged(rule, deltas, base, moments, weights, seed, _compute_dtype(compute_dtype, [deltas]))
    return replace(result, stats=on_host(result.stats, host.helped))


def _merged(
    rule: Method,
    deltas: Tensor,
    base: Tensor | None,
    moments: Tensor | None,
    weights: Sequence[float] | None,
    seed: int,
    dtype: torch.dtype,
) -> LayerResult:
    for where, values in (("deltas", deltas), ("base", base), ("moments", moments)):
        if values is not None:
            _check_finite(where, values)
    layer = _layer(rule, weights, len(deltas), seed, deltas.device)
    if base is not None:
        layer = replace(layer, base=base.detach().to(device=deltas.device, dtype=dtype))
    if moments is not None:
        layer = replace(layer, moments=moments.detach().to(device=deltas.device, dtype=dtype))
    deltas = _in_range("deltas", deltas.detach(), dtype)
    if dtype == torch.float64:  # which holds the squares of any other type
        check_energies(energies(deltas), "deltas", dtype)
    with _refusals(rule, dtype):
        result = rule.merge(deltas, layer)
    _check_result(rule, dtype, result.delta)
    return result


def merge_factors(
    factors: Sequence[tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]],
    method: AnyMethod = "auto",
    *,
    weights: Sequence[float] | None = None,
    base: Float[Tensor, "out in"] | Array | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    **params: Any,
) -> LowRankResult:
    """Merge task vectors of low rank, `D_t = U_t V_t`, given as pairs `(U_t, V_t)` of (out, r_t) and (r_t, in).

    For LoRA U_t is `scaling * B` and V_t is `A`. The result is that of `merge_deltas` on the products; average,
    task_arithmetic, ace, ace_auto, anchored, kron, kron_auto, actmat, cauchy, swudi_a, knots, core_space and the
    spectral rules do not form them where the ranks together are fewer than a side of the layer. For the others they are
    formed, and `stats.statuses` says so. Rules that merge weights merge the task vectors; `base` is for kron_auto and
    trust.

    Where two or more experts share the row space of V_t, as with a frozen A, the input side says nothing of the tasks:
    ace, actmat and the like then merge the transposes, and `stats.shared_input_side` is True.

    Returns `.left` (out, k) and `.right` (k, in), `.delta()` for their product, `.truncated(rank)` and `.stats`; where
    the products were formed, `.left` is (out, in) and `.right` is None. Other arguments as in `merge_deltas`.
    """
    rule = as_rule(method, params)
    with with_host(factors[0][0].device if factors else torch.device("cpu")) as host:
        result = _merged_factors(rule, factors, weights, base, seed, compute_dtype)
    return replace(result, stats=on_host(result.stats, host.helped))


def _merged_factors(
    rule: Method,
    factors: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float] | None,
    base: Array | None,
    seed: int,
    compute_dtype: torch.dtype | None,
) -> LowRankResult:
    _check_factors(factors)
    base = None if base is None else _tensor("base", base)
    _check_base(base, (len(factors[0][0]), factors[0][1].shape[1]))
    if base is not None:
        _check_finite("base", base)
    if rule.needs.calibration:
        cure = "give the products of the factors to merge_deltas, with `moments`"
        raise UsageError(f"method {rule.name}", "needs what was measured on data", cure)
    dtype = _compute_dtype(compute_dtype, [factor for pair in factors for factor in pair])
    device = factors[0][0].device
    layer = _layer(rule, weights, len(factors), seed, device)
    left, right = (
        tuple(_in_range(f"factors {t}", pair[side].detach(), dtype).to(device) for t, pair in enumerate(factors, 1))
        for side in (0, 1)
    )
    if base is not None:
        layer = replace(layer, base_energy=float(energies(base.detach().to(device, dtype)[None])))
    updates = LowRank(left, right)
    check_energies(updates.energies(), "factors", torch.float64)
    with _refusals(rule, dtype):
        result = merge_low_rank(rule, updates, layer, dtype)
    _check_result(rule, dtype, result.left, *([] if result.right is None else [result.right]))
    return result


def _check_base(base: Tensor | None, shape: Sequence[int]) -> None:
    if base is not None and list(base.shape) != list(shape):
        what = f"has shape {list(base.shape)}, the task vectors {list(shape)}"
        raise UsageError("base", what, "give the layer that the task vectors start from")


def _tensor(where: str, values: Any) -> Tensor:
    """A tensor as it is, a numpy array as a new one."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor(np.asarray(values))
    except (TypeError, ValueError):
        raise UsageError(where, f"{type(values).__name__} is no array", "give tensors or numpy arrays") from None


def _stacked(where: str, values: Any) -> Tensor:
    """One tensor of what may be one for each expert."""
    if not isinstance(values, list | tuple):
        return _tensor(where, values)
    parts = [_tensor(where, value) for value in values]
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise UsageError(where, f"are of shapes {', '.join(map(str, sorted(shapes)))}", "give those of one layer")
    return torch.stack(parts) if parts else torch.empty(0)


def _check_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not factors:
        raise UsageError("factors", "there are none", "give a pair (U_t, V_t) for each expert")
    for t, pair in enumerate(factors, 1):
        if len(pair) != 2:
            raise UsageError(f"factors {t}", f"has {len(pair)} parts", "give a pair (U_t, V_t) for each expert")
        U, V = pair
        shapes = f"{list(U.shape)} and {list(V.shape)}"
        if U.ndim != 2 or V.ndim != 2 or U.shape[1] != V.shape[0] or not U.numel() or not V.numel():
            raise UsageError(f"factors {t}", f"shapes {shapes} have no product", "give (out, r) and (r, in)")
        if U.shape[0] != factors[0][0].shape[0] or V.shape[1] != factors[0][1].shape[1]:
            raise UsageError(f"factors {t}", f"shapes {shapes} are of another layer", "give updates of one layer")
        if not (U.dtype.is_floating_point and V.dtype.is_floating_point):
            raise UsageError(f"factors {t}", f"{U.dtype} and {V.dtype}", "give floating-point factors")
        for factor in (U, V):
            _check_finite(f"factors {t}", factor)


def _check_moments(rule: Method, deltas: Tensor, moments: Tensor | None) -> None:
    wanted = rule.needs.calibration
    if wanted is None and moments is None:
        return
    if wanted is None:
        raise UsageError("moments", f"{rule.name} does not use them", "leave them out")
    side = deltas.shape[-1]
    shape: tuple[int, ...] = (len(deltas), side, side)
    what = "second moments of the layer's inputs"
    if wanted == "gradients":
        shape, what = tuple(deltas.shape), "squared gradients"
    elif wanted == "both sides":
        shape = (len(deltas), side**2 + deltas.shape[-2] ** 2)
        what = "second moments of the layer's inputs and of the gradients at its outputs"
    if moments is None:
        cure = "give them as `moments`, or merge folders with `calibration`"
        raise UsageError(f"method {rule.name}", f"needs {what} of each expert", cure)
    if moments.shape != shape:
        raise UsageError("moments", f"shape {list(moments.shape)}", f"give {what} of shape {list(shape)}")


def _check_finite(where: str, values: Tensor) -> None:
    if not is_finite(values):
        raise CheckpointError(where, "has values that are not finite", "mend the checkpoint they come from")


def _in_range(where: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, finite as they are, in the type of the work."""
    found = values.to(dtype)
    if found is not values and not is_finite(found):
        raise UsageError(where, "has values beyond the range of float32", "leave out compute_dtype, or make it float64")
    return found


def _check_result(rule: Method, dtype: torch.dtype, *values: Tensor) -> None:
    if not all(map(is_finite, values)):
        raise NumericalError(f"method {rule.name}", "its result is not finite", _nearer(dtype))


@contextmanager
def _refusals(rule: Method, dtype: torch.dtype) -> Iterator[None]:
    """What torch has no result for is named."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:  # its word for no convergence, no memory and numbers beyond a type
        shortage = shortage_of(failure, f"method {rule.name}")
        if shortage is not None:
            raise shortage.in_memory from failure
        reason = (str(failure).splitlines() or ["no result"])[0][:200]
        raise NumericalError(f"method {rule.name}", reason, _nearer(dtype)) from failure


def _nearer(dtype: torch.dtype) -> str:
    return "use compute_dtype=torch.float64" if dtype == torch.float32 else "scale the updates to a size near 1"


def _compute_dtype(asked: torch.dtype | None, given: Sequence[Tensor]) -> torch.dtype:
    dtype = asked or (torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise UsageError("compute_dtype", f"{dtype} is too narrow to add up in", "use torch.float32 or torch.float64")
    return dtype


def _layer(rule: Method, weights: Sequence[float] | None, experts: int, seed: int, device: torch.device) -> Layer:
    """What a rule may know of a layer that has no name, its weights checked."""
    factors = _checked_weights(weights, experts)
    check_weights(rule, factors)
    check_experts(rule, factors)
    return Layer(torch.tensor(factors, dtype=torch.float64).to(device), expert_seeds(seed, "", range(experts)))


def _checked_weights(weights: Sequence[float] | None, experts: int) -> list[float]:
    try:
        factors = [1.0] * experts if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise UsageError("weights", "not all are numbers", "give one number for each expert") from None
    if len(factors) != experts:
        raise UsageError("weights", f"{len(factors)} weights for {experts} experts", "give one weight each")
    if not all(math.isfinite(factor) for factor in factors):
        raise UsageError("weights", "not all are finite", "give finite numbers")
    return factors
