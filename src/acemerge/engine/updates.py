"""What an adapter adds to a tensor: the factors of its task vector, or that itself."""

from __future__ import annotations

from acemerge.checkpoints.adapter import StackedFactors
from acemerge.shapes import Float, Tensor


def own_factors(
    A: Float[Tensor, "ranks in"], B: Float[Tensor, "out ranks"], stack: StackedFactors | None
) -> tuple[Float[Tensor, "*count r in"], Float[Tensor, "*count out r"]]:
    """The factors of one tensor, where they lie with those of a mixture's other experts; see `StackedFactors`."""
    if stack is None:
        return A, B
    A, B = A.unflatten(0, (stack.count, -1)), B.unflatten(1, (-1, stack.count)).permute(2, 0, 1)
    if stack.number is None:
        return A, B
    return A[stack.number], B[stack.number].chunk(stack.parts)[stack.part]


def factors_of(
    A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scaling: float, transposed: bool
) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "r columns"]]:
    """U and V of the task vector `U V` of a tensor that is stored (out, in), or (in, out) where `transposed`."""
    U = B * scaling
    return (A.T, U.T) if transposed else (U, A)


def add_update(
    D: Float[Tensor, "*count out in"],
    W0: Float[Tensor, "*count out in"],
    A: Float[Tensor, "*count r in"],
    B: Float[Tensor, "*count out r"],
    scaling: float,
    magnitude: Float[Tensor, " out"] | None = None,
) -> None:
    """`D += s B A` in place, for one matrix or a stack of them; all of one type and device.

    With a magnitude (DoRA, arXiv 2402.09353, eq. 5) the weight is `W = m V / ||V||` by rows, `V = W0 + D + s B A`, and
    `D = W - W0`. The product itself is never rounded into a weight first.
    """
    if D.ndim == 3:
        D.baddbmm_(B, A, alpha=scaling)
    else:
        D.addmm_(B, A, alpha=scaling)
    if magnitude is not None:
        V = D + W0
        V.mul_((magnitude / V.norm(dim=1))[:, None])
        D.copy_(V.sub_(W0))
