"""Least squares with a weight on the outputs as well as on the inputs, one pair for each expert:

    H(X) = sum_t A_t X S_t,   A_t (out, out), S_t (in, in), positive semidefinite

H has (out in)^2 entries and is only ever applied. What it is solved with are conjugate gradients, preconditioned by the
nearest thing that comes apart into the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from acemerge.linalg.gram import add_lower, mirror, symmetric_product
from acemerge.linalg.select import largest_entry
from acemerge.linalg.solve import cholesky, invert
from acemerge.shapes import Float, Tensor

_SMALL = 512  # layers with no longer side are solved in float64, where that costs little
_FINEST = 1e-5  # and all where a smaller residual is asked for
_HIDDEN = 3e-3  # of the largest: singular values below it are inexact, from a Gram matrix in float32
_HIDDEN_SHARE = 1e-3

Map = Callable[[Tensor], Tensor]  # of matrices (out, in) to such, linear


def solving_dtype(deltas: Float[Tensor, "T out in"], tol: float) -> torch.dtype:
    """What layers of this size are solved in, to this residual."""
    return torch.float64 if max(deltas.shape[1:]) <= _SMALL or tol < _FINEST else deltas.dtype


def _right_singular(D: Float[Tensor, "out in"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "in r"]]:
    """Singular values, ascending, and right singular vectors of D, which has no more columns than rows.

    From the smaller Gram matrix, in D's type; in float64 what its rounding hides, below 1e-7 of the largest or so, is
    left out.
    """
    values, V = torch.linalg.eigh(symmetric_product(D))
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps if D.dtype == torch.float64 else 0.0
    first = int((values <= floor).sum())
    return values[first:].sqrt(), V[:, first:]


@dataclass(frozen=True)
class Spiked:
    """One expert's `A = P P^T + a I` and `S = Q Q^T + b I`, largest directions last; `floors` are (a, b)."""

    P: Float[Tensor, "out k"]
    Q: Float[Tensor, "in k"]
    floors: tuple[float, float]

    def leading(self, k: int, sizes: tuple[int, int]) -> Spiked:
        """What `spiked_sides` gives for so few directions: all but the k largest at their mean."""
        faint = self.P.shape[1] - k
        if faint <= 0:
            return self
        factors, floors = list[Tensor](), list[float]()
        for F, floor, size in zip((self.P, self.Q), self.floors, sizes, strict=True):
            spikes = F.square().sum(0)  # (k,) above the floor
            raised = float(spikes[:faint].sum()) / (size - k)
            shrunk = (1 - raised / spikes[faint:]).clamp_min(0).sqrt()
            factors.append(F[:, faint:] * shrunk.nan_to_num(0.0))
            floors.append(floor + raised)
        return Spiked(factors[0], factors[1], (floors[0], floors[1]))


def spiked_sides(
    D: Float[Tensor, "out in"], sizes: tuple[int, int], weight: float, k: int, dtype: torch.dtype
) -> tuple[Spiked, Float[Tensor, "out in"]] | None:
    """`A = sqrt(w) (D D^T)^(1/2)` and `S = sqrt(w) (D^T D)^(1/2)`, each over its mean eigenvalue, the trace over its
    size in `sizes`, with all eigenvalues beyond the k largest at their mean: what rounding and chance make of small
    directions is not told apart, and A and S are k directions and a multiple of I. With them goes `A D S`. D is not
    zero and has no more columns than rows.

    With `D = U diag(s) V^T` the roots are `U diag(s) U^T` and `V diag(s) V^T`. None in float32 where it would not do:
    more than a thousandth of the sum of the singular values is of those that the rounding of a Gram matrix reaches.
    """
    peak = largest_entry(D)
    D = D.to(dtype) / peak  # squares of very small or large entries would leave the range of float32
    s, V = _right_singular(D)
    if dtype == torch.float32 and float(s[s < _HIDDEN * s[-1]].sum()) > _HIDDEN_SHARE * float(s.sum()):
        return None
    top, V = s[-k:], V[:, -k:]
    rest = float(s.sum() - top.sum())
    floors = [rest / (size - len(top)) if size > len(top) else 0.0 for size in sizes]
    out, columns = (weight**0.5 * size / float(s.sum()) for size in sizes)  # mean eigenvalue one
    U = D @ (V / top).to(dtype)
    spikes = [(top - floor).clamp_min(0).sqrt() for floor in floors]
    faint = floors[0] * floors[1]
    wanted = (U * (top * (top.square() - faint)).to(dtype)) @ V.T.to(dtype)
    wanted.add_(D, alpha=faint).mul_(out * columns * peak)
    P, Q = U.mul_((spikes[0] * out**0.5).to(dtype)), (V * (spikes[1] * columns**0.5)).to(dtype)
    return Spiked(P, Q, (floors[0] * out, floors[1] * columns)), wanted


def spiked_sum(sides: Sequence[Spiked], products: torch.dtype | None = None) -> Map:
    """`X -> sum_t A_t X S_t`, the P_t side by side: two products with all of them, and small ones for each.

    With `products` all factors of products are rounded to this type; what comes out is in X's.
    """
    kind = products or sides[0].P.dtype
    shared = sides[0].Q.new_zeros(len(sides[0].Q), len(sides[0].Q))  # sum_t a_t S_t
    for one in sides:
        add_lower(shared, one.Q.T, one.floors[0])
    mirror(shared).diagonal().add_(sum(one.floors[0] * one.floors[1] for one in sides))
    shared, P = shared.to(kind), torch.cat([one.P for one in sides], 1).to(kind)  # (in, in), (out, K)
    parts = [(one.Q.to(kind), one.floors[1]) for one in sides]

    def applied(X: Tensor) -> Tensor:
        given, X = X.dtype, X.to(kind)
        inner = (P.T @ X).split([Q.shape[1] for Q, _ in parts])
        weighed = [torch.add((Z @ Q) @ Q.T, Z, alpha=b) for Z, (Q, b) in zip(inner, parts, strict=True)]
        return torch.addmm(X @ shared, P, torch.cat(weighed)).to(given)

    return applied


def pooled_inverse(
    sides: Sequence[Spiked], shares: Sequence[float], damping: float, products: torch.dtype | None = None
) -> Map:
    """`X -> L^(-1) X R^(-1)`, `L = sum_t f_t A_t + damping I` and R of the S_t alike, f the shares.

    With mean eigenvalues of one the damping bounds the condition by `1 + n sum_t f_t / damping`. It must be so large
    that a Cholesky factor exists in the type of the sides, for here L and R are more than a preconditioner. With
    `products` X and the inverses are rounded to this type.
    """
    of_rows, of_columns = (
        _damped_inverse(
            [one.Q if side else one.P for one in sides],
            shares,
            damping + sum(f * one.floors[side] for f, one in zip(shares, sides, strict=True)),
            products,
        )
        for side in (0, 1)
    )
    return lambda X: of_columns(of_rows(X.T).T)


def _damped_inverse(
    factors: Sequence[Tensor], shares: Sequence[float], damping: float, products: torch.dtype | None
) -> Map:
    """`X -> X (sum_t f_t F_t F_t^T + damping I)^(-1)`, f the shares.

    Where the factors together have fewer columns than rows, in the space of these columns (Woodbury). To be rounded,
    the inverse is formed: then a product takes the place of two solves.
    """
    n = len(factors[0])
    if sum(F.shape[1] for F in factors) >= n:
        total = factors[0].new_zeros(n, n)
        for F, share in zip(factors, shares, strict=True):
            add_lower(total, F.T, share)
        return _inverse(mirror(total), damping, products)
    F = torch.cat([share**0.5 * F for F, share in zip(factors, shares, strict=True)], 1)  # (n, K)
    inner = _inverse(symmetric_product(F), damping, products)
    F = F.to(products or F.dtype)

    def applied(X: Tensor) -> Tensor:
        taken = torch.empty_like(X, dtype=F.dtype)  # laid out as X is, which may be transposed
        torch.mm(inner(X.to(F.dtype) @ F), F.T, out=taken)
        return torch.sub(X, taken, out=taken if taken.dtype == X.dtype else None).div_(damping)

    return applied


def _inverse(A: Float[Tensor, "n n"], damping: float, products: torch.dtype | None) -> Map:
    """`X -> X (A + damping I)^(-1)`, formed where it is to be rounded. A is overwritten."""
    A.diagonal().add_(damping)
    L = None if products is None else cholesky(A)
    if L is None:
        return invert(A)
    inverse = torch.cholesky_inverse(L).to(products)
    return lambda X: (X.to(products) @ inverse).to(X.dtype)


@dataclass(frozen=True)
class Descent:
    """Where conjugate gradients ended: X, after so many steps, with this residual relative to that of X = 0.

    `pulled` is `<X, P X>`, 0 where there is no ridge.
    """

    X: Float[Tensor, "out in"]
    steps: int
    residual: float
    pulled: float = 0.0


def conjugate_gradients(
    apply: Map,
    precondition: Map,
    B: Float[Tensor, "out in"],
    steps: int,
    tol: float,
    floor: float = 0.0,
    ridge: float = 0.0,
    exact: Map | None = None,
) -> Descent:
    """Solve `H(X) + ridge P(X) = B` from X = 0 until the residual is at most `tol ||B||_F`, in `steps` steps at most.

    `apply` is H, `precondition` the inverse of P, which itself is never applied: where P takes the directions is
    carried along. A right-hand side of no more than `floor` in norm is rounding and taken for zero. H and P are
    symmetric and positive definite, H semidefinite where there is a ridge. Where `apply` is coarse, `exact` is H as it
    should be, without a ridge: the residual is measured with it at the end, and where it is too large the descent
    begins anew from it.
    """
    X, size = torch.zeros_like(B), float(B.norm())
    if size <= floor:
        return Descent(X, 0, 0.0)
    R = B / size  # squares of very small or large entries would leave the range of float32
    direction = torch.zeros_like(B)
    pull, pulled = (torch.zeros_like(B) for _ in range(2)) if ridge else (None, None)  # P(direction), P(X)
    goal = tol if exact is None else 0.7 * tol  # what coarse products lead astray
    taken, residual, before, done = 0, 1.0, 1.0, False
    while not done and taken < steps:
        Z = precondition(R)
        descent = dot(R, Z)
        direction.mul_(descent / before).add_(Z)
        image = apply(direction)
        if pull is not None:
            pull.mul_(descent / before).add_(R)
            image.add_(pull, alpha=ridge)
        length = descent / dot(direction, image)
        X.add_(direction, alpha=length)
        if pull is not None and pulled is not None:
            pulled.add_(pull, alpha=length)
        R.sub_(image, alpha=length)
        taken, residual, before = taken + 1, float(R.norm()), descent
        done = residual <= goal
        if exact is not None and (done or taken == steps):
            R = (B / size).sub_(exact(X))
            direction.zero_()
            residual = float(R.norm())
            done = residual <= tol
    share = dot(X, pulled) * size**2 if pulled is not None else 0.0
    return Descent(X.mul_(size), taken, residual, share)


def dot(X: Float[Tensor, "out in"], Y: Float[Tensor, "out in"]) -> float:
    """`<X, Y>_F`."""
    return float(torch.dot(X.flatten(), Y.flatten()))
