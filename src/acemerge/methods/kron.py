"""Least squares with a weight on the outputs as well as on the inputs, anchored at the sum of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from acemerge.linalg.two_sided import Map, conjugate_gradients, solving_dtype
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.both_sides import Products, operations, reached, system, upright
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

_PRECONDITIONED = 0.5  # share of the kept directions that the preconditioner tells apart: takes no more steps
_USUAL = 7  # steps to the default tol: 4 to 13 on text8's layers


@dataclass(frozen=True)
class Kron:
    """Least squares on both sides: an error counts where an expert's inputs are, and its outputs.

        M minimises  sum_t ||A_t^(1/2) (M - D_t) S_t^(1/2)||_F^2 + l ||M - sum_t D_t||_F^2,   l = lam T
        sum_t A_t M S_t + l M = sum_t A_t D_t S_t + l sum_t D_t
        A_t = (D_t D_t^T)^(1/2),  S_t = (D_t^T D_t)^(1/2),  each over its mean eigenvalue, all eigenvalues beyond the
              k largest at their mean, k = max(64, int(keep min(out, in)))

    Source: this library. The root, because gradient descent on a linear layer gives `D = (W* - W_0) Sigma const` for
    inputs of covariance Sigma, so that `D^T D` is about its square. By conjugate gradients from `sum_t D_t`, until the
    residual is `tol` of what it was, or for `steps` steps: then `status` is "not converged", and `residual` how far it
    came; "float64" says that float32 would not do, as for updates of low rank. With `products` "bfloat16" the steps
    multiply in it, and the residual is that of a last look in float32: where it is above `tol`, they go on. `keep` 1
    is the formula without what follows the comma.
    Experts without an update drop out of T. Scaling all updates scales M. `lam` to infinity gives the sum, and experts
    that share no input direction or no output direction are all kept whole, up to what the mean eigenvalues take. T
    equal experts U diag(s) V^T give, with `keep` 1, singular values `s_i (c s_i^2 + lam T) / (c s_i^2 + lam)`,
    `c = out in / (sum_j s_j)^2`: the expert in its energetic directions, T of it in faint ones, for the rule takes
    equal updates for T tasks that agree. An expert that is there twice by mistake is to be left out.
    A weight multiplies an expert's term, its share of T and the expert in the sum, and may not be negative: a weight
    of 2 is the expert twice.
    """

    name: ClassVar[str] = "kron"
    source: ClassVar[str] = "acemerge"

    lam: Annotated[float, Field(gt=0, allow_inf_nan=False, description="pull to the sum, for each expert")] = 0.1
    keep: Annotated[float, Field(ge=0, le=1, description="share of the directions that are told apart")] = 0.25
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of conjugate gradients, at most")] = 30
    tol: Annotated[float, Field(gt=0, lt=1, description="residual to reach, as a share of the sum's")] = 1e-2
    products: Annotated[Products, Field(description="type of products in a step, for a side above 512")] = "float32"
    scale: Scale = 1.0

    @property
    def needs(self) -> Needs:
        work = Workspace(26, 8, "longer", each=4)
        return Needs(matrix=True, weights="not negative", work=work, factors="frame")

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        tall = upright(deltas, layer)
        if tall is None:
            return no_update(deltas)
        asked = solving_dtype(deltas, self.tol)
        given = system(tall, self.keep, self.keep * _PRECONDITIONED, self.lam**0.5, asked, self.products)
        dtype, ridge = given.B.dtype, self.lam * sum(tall.weights)
        start = torch.zeros_like(tall.experts[0], dtype=dtype)  # laid out as they are
        for D, weight in zip(tall.experts, tall.weights, strict=True):
            start.add_(D, alpha=weight / given.size)
        start = start.contiguous()
        B = given.B.sub_((given.exact or given.applied)(start))

        def with_ridge(applied: Map) -> Map:
            return lambda X: applied(X).add_(X, alpha=ridge)

        exact = None if given.exact is None else with_ridge(given.exact)
        found = conjugate_gradients(
            with_ridge(given.applied), given.pooled, B, self.steps, self.tol, given.rounding, exact=exact
        )
        status = reached(found.residual <= self.tol, in_float64=dtype != asked)
        stats = LayerStats((status,), steps=found.steps, residual=found.residual)
        M = start.add_(found.X).mul_(self.scale * given.size)
        return LayerResult(tall.turned_back(M).to(deltas.dtype), stats)

    def operations(self, experts: int, rows: int, columns: int) -> int:
        """With the steps that it usually takes."""
        steps = min(self.steps, _USUAL)
        return operations(experts, rows, columns, self.keep, self.keep * _PRECONDITIONED, steps)
