"""WUDI and its closed form: every expert's update should not be disturbed in the directions it uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.optim.adam import adam

from acemerge.linalg.gram import NormalEquations, energies
from acemerge.linalg.rounding import NULL
from acemerge.methods.actmat import least_squares_operations
from acemerge.methods.base import Layer, LayerResult, Needs, Scale, Workspace, no_update
from acemerge.methods.elementwise import weighted_sum
from acemerge.methods.stats import LayerStats
from acemerge.shapes import Float, Tensor

# In products and eigenvectors, or where the system is many times the layer, in these alone.
_SPECTRAL = Workspace(11, 6, "columns", then=Workspace(5, 8, "columns"))
_FLOOR = 1e-8  # smallest eigenvalue that is divided by, as a share of the largest


@dataclass(frozen=True)
class Wudi:
    """WUDI: gradient descent on the interference, from the sum.

        L(M) = sum_t ||(M - D_t) D_t^T||_F^2 / n_t,   start sum_t D_t, Adam

    Source: arXiv 2503.08099. With `M = X0 + N` and `X0 = sum_t D_t` the gradient is `2 (N A - B)`,
    `A = sum_t D_t^T D_t / n_t`, `B = sum_t (D_t - X0) D_t^T D_t / n_t`: a step costs the same for any number of
    experts, and nothing cancels at the start. Departures: an expert with no update drops out, and a gradient that is
    rounding at the start, as of experts that cancel, moves nothing. A weight multiplies
    an expert's term and its part of the start; it may not be negative.
    """

    name: ClassVar[str] = "wudi"
    source: ClassVar[str] = "arXiv 2503.08099"
    needs: ClassVar[Needs] = Needs(
        matrix=True, weights="not negative", work=Workspace(7, 2, "columns"), input_side=True
    )

    steps: Annotated[int, Field(ge=0, le=100_000, description="steps of Adam")] = 300
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="its learning rate")] = 1e-5
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        X0 = weighted_sum(deltas, layer.weights)
        equations = normalised_equations(deltas, layer, deltas.dtype, X0)
        if equations is None:
            return no_update(deltas)
        A, B = equations
        if B.norm() <= NULL * A.trace() * energies(deltas).max().sqrt():  # Adam would make as large steps of rounding
            B.zero_()
        N, gradient, mean, square = (torch.zeros_like(X0) for _ in range(4))
        step = torch.zeros((), device=N.device)
        for _ in range(self.steps):
            torch.addmm(B, N, A, beta=-2, alpha=2, out=gradient)
            _adam(N, gradient, mean, square, step, self.lr)
        return LayerResult(X0.add_(N).mul_(self.scale), LayerStats(steps=self.steps))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        step = 2 * rows * columns * columns
        return least_squares_operations(experts, rows, columns, symmetric=False, spared=0) + self.steps * step


@dataclass(frozen=True)
class SwudiA:
    """SWUDI-A: the minimiser of WUDI's loss in the directions that carry it, the sum elsewhere.

        A = V diag(l) V^T, descending;  K = ceil((sum sqrt(l))^2 / sum l)
        M = X0 (I - V_K V_K^T) + B V_K diag(1 / l_K) V_K^T,   X0 = sum_t D_t

    with `A = sum_t D_t^T D_t / n_t` and `B = sum_t D_t D_t^T D_t / n_t`. Source: arXiv 2606.07289. Eigenvalues
    are floored at 1e-8 of the largest when they divide, and zero below 2^-42 of it; K is the next whole number but for
    rounding. `anchor: mean` takes the mean for X0, which large language
    models need. Weights as in `wudi`.
    """

    name: ClassVar[str] = "swudi_a"
    source: ClassVar[str] = "arXiv 2606.07289"
    needs: ClassVar[Needs] = Needs(
        matrix=True, weights="not negative", work=_SPECTRAL, factors="frame", input_side=True
    )

    anchor: Annotated[Literal["sum", "mean"], Field(description="M outside the kept directions")] = "sum"
    scale: Scale = 1.0

    def merge(self, deltas: Float[Tensor, "T out in"], layer: Layer) -> LayerResult:
        equations = normalised_equations(deltas, layer, torch.float64, None)
        if equations is None:
            return no_update(deltas)
        A, B = equations
        X0 = weighted_sum(deltas, layer.weights).double()
        if self.anchor == "mean":
            X0 /= layer.weights[energies(deltas) > 0].sum()
        values, vectors = torch.linalg.eigh(A)
        spectrum = values.flip(0) * (values.flip(0) > NULL**2 * values[-1])  # l, (in,)
        K = math.ceil(float(spectrum.sqrt().sum().square() / spectrum.sum()) * (1 - NULL))  # n at most
        V, l_K = vectors.flip(1)[:, :K], spectrum[:K].clamp_min(_FLOOR * float(spectrum[0]))
        M = X0 + ((B @ V) / l_K - X0 @ V) @ V.T
        return LayerResult((self.scale * M).to(deltas.dtype), LayerStats(rank=K))

    def operations(self, experts: int, rows: int, columns: int) -> int:
        spectral = 9 * columns**3 + 6 * rows * columns**2
        return least_squares_operations(experts, rows, columns, symmetric=True, spared=0) + spectral


def _adam(N: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: float) -> None:
    """A step of torch's Adam at its defaults, in place. The class would import its compiler, 80 MB."""
    adam(
        *([N], [gradient], [mean], [square], [], [step]),
        fused=True,
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
    )


def normalised_equations(
    deltas: Float[Tensor, "T out in"],
    layer: Layer,
    dtype: torch.dtype,
    origin: Float[Tensor, "out in"] | None,
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"]] | None:
    """`A = sum_t w_t D_t^T D_t / n_t` and `B = sum_t w_t (D_t - origin) D_t^T D_t / n_t`.

    None where no expert counts.
    """
    n = torch.where(layer.weights > 0, energies(deltas), 0)
    weights = torch.where(n > 0, layer.weights * n.max() / n, 0)
    if not weights.any():
        return None
    size = n.max().sqrt().item()  # squares of very small or large updates would leave the range of float32
    equations = NormalEquations(deltas.shape[1], deltas.shape[2], dtype, deltas.device)
    for D, weight in zip(deltas, weights.tolist(), strict=True):
        source = D.to(dtype) / size
        target = source if origin is None else (D - origin).to(dtype) / size
        equations.add(target, source, weight)
    A, B = equations.sums()
    return A, B.mul_(size)
