"""The one solution behind the covariance family: a weighted least-squares fit of all experts' updates.

    M = (sum_t X_t (a_t G_t + l_t I)) (sum_t a_t G_t + e I + 1 c^T)^(-1),   G_t = Z_t^T Z_t

A rule chooses the source Z_t of its estimate of task t's second moment, the target X_t, the weights a_t, and
the regulariser: a ridge e, its pull l_t towards the targets, and the prior row c. Where second moments were measured,
the sources are the G_t themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from acemerge.linalg.gram import NormalEquations, symmetric_product
from acemerge.linalg.solve import Diagnosis, invert, with_rank_one
from acemerge.shapes import Float, Tensor


@runtime_checkable
class Experts(Protocol):
    """The matrix (out, in) of the t-th expert in a type, made when asked for: no more than a few exist at once.

    One that is not there already may be made in `room`: new memory takes longer than the arithmetic.
    """

    def __call__(self, t: int, dtype: torch.dtype, room: Tensor | None = None) -> Tensor: ...


def as_given(deltas: Float[Tensor, "T out in"]) -> Experts:
    """The task vectors themselves."""
    return lambda t, dtype, room=None: in_type(deltas[t], dtype, room)


def in_type(D: Float[Tensor, "out in"], dtype: torch.dtype, room: Tensor | None) -> Float[Tensor, "out in"]:
    """D itself where it is in this type, else a copy, in the room where there is one."""
    return D.to(dtype) if room is None or D.dtype == dtype else room.copy_(D)


@dataclass(frozen=True)
class Problem:
    """What a rule asks for. `targets` and `sources` may be one and the same function, and must be for pulls.

    `measured`: the sources are the second moments G_t (in, in); not with pulls.

    The ridge e is `ridge + relative_ridge * mean(diag(sum_t a_t G_t))`. `prior` is the factor f of the row
    `c = f (1 / in) 1^T sum_t a_t G_t`, None without it. `ones` is 1 (in,) in other coordinates than the layer's own.
    `residual_of` makes the X (out, in) whose residual is wanted: with the fit, so that what it is made from need not be
    kept beside what comes of it.
    """

    targets: Experts
    sources: Experts
    weights: list[float]
    shape: tuple[int, int]
    pulls: list[float] | None = None
    ridge: float = 0.0
    relative_ridge: float = 0.0
    prior: float | None = None
    ones: Tensor | None = None
    measured: bool = False
    residual_of: Callable[[], Tensor] | None = None

    def mean_of_columns(self, X: Float[Tensor, "m in"]) -> Float[Tensor, " m"]:
        """`X 1 / in`."""
        return X.mean(1) if self.ones is None else X @ self.ones.to(X.dtype) / X.shape[1]

    @property
    def heaviest(self) -> int:
        """The expert of the largest weight, of which M cannot be far."""
        return max(range(len(self.weights)), key=self.weights.__getitem__)

    @property
    def prefers_dual(self) -> bool:
        """Fewer rows in all experts together than columns: their own space is smaller, and of full rank."""
        return not self.measured and prefers_dual(len(self.weights), *self.shape)


@dataclass(frozen=True)
class Fit:
    """The solution M, what is known of its system matrix and whether M is accurate enough.

    `repeated`: it is, in float64, for the type that was asked for was not enough.
    `residual` is, where the problem names X, `sum_t a_t X_t G_t - (1 / T) X (sum_t a_t G_t + e I)`.
    """

    M: Float[Tensor, "out in"]
    diagnosis: Diagnosis
    trusted: bool
    residual: Float[Tensor, "out in"] | None = None
    repeated: bool = False


def prefers_dual(experts: int, rows: int, columns: int) -> bool:
    """Whether N = T out rows are fewer than the columns."""
    return experts * rows < columns


def least_squares(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """Solve the problem in `dtype`."""
    return (_dual if problem.prefers_dual else _primal)(problem, dtype, device)


def least_squares_trusted(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """Solve the problem in `dtype`, and again in float64 where that is not accurate enough."""
    fit = least_squares(problem, dtype, device)
    if fit.trusted:
        return fit
    del fit
    return replace(least_squares(problem, torch.float64, device), repeated=True)


def _primal(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """In the input space: A (in, in), running sums over the experts.

    Where second moments are formed, one expert r is spared its product with its own, for A holds all of them:

        M = X_r + B' A^(-1),   B' = sum_(t != r) (X_t - X_r) (a_t G_t + l_t I) + (sum_t l_t - e) X_r
    """
    out, columns = problem.shape
    equations = NormalEquations(out, columns, dtype, device)
    pulls = problem.pulls or [0.0] * len(problem.weights)
    same, heaviest = problem.targets is problem.sources, problem.heaviest
    origin = problem.targets(heaviest, dtype) if problem.measured or out >= columns else None  # X_r
    room = torch.empty(problem.shape, dtype=dtype, device=device)
    for t, (weight, pull) in enumerate(zip(problem.weights, pulls, strict=True)):
        if origin is not None and t == heaviest:
            X, Z = origin, origin if same else problem.sources(t, dtype)
        else:
            Z = problem.sources(t, dtype, room if same else None)
            X = Z if same else problem.targets(t, dtype, room)
        if problem.measured:
            equations.add_moment(X, Z, weight, origin, room)
        else:
            equations.add(X, Z, weight, pull, origin, room)
    del room
    A, B = equations.sums()
    prior = None if problem.prior is None else problem.mean_of_columns(A.T) * problem.prior  # c, (in,)
    ridge = problem.ridge + problem.relative_ridge * A.diagonal().mean().item()
    A.diagonal().add_(ridge)
    if origin is not None:
        B.add_(origin, alpha=sum(pull for pull, a in zip(pulls, problem.weights, strict=True) if a) - ridge)
    inverse = invert(A)
    if origin is not None and not inverse.diagnosis.regular:  # then A^(-1) A is no identity
        B.addmm_(origin, A)
        origin = None
    M = inverse(B) if origin is None else inverse(B).add_(origin)
    trusted = inverse.diagnosis.trusts(A, B, M)
    row, diagnosis = None if prior is None else inverse(prior[None])[0], inverse.diagnosis
    del inverse
    if row is not None:
        M = with_rank_one(M, row, problem.ones)
    wanted = trusted and problem.residual_of is not None
    return Fit(M, diagnosis, trusted, primal_residual(problem, A, B, origin) if wanted else None)


def primal_residual(
    problem: Problem,
    A: Float[Tensor, "in in"],
    B: Float[Tensor, "out in"],
    origin: Float[Tensor, "out in"] | None,
) -> Float[Tensor, "out in"] | None:
    """`Fit.residual` from the system matrix A and the right-hand side `B + origin A`, None where none is wanted."""
    if problem.residual_of is None:
        return None
    residual, room = B.clone(), torch.empty_like(B)
    for t, pull in enumerate(problem.pulls or ()):
        if pull:
            residual.sub_(problem.targets(t, B.dtype, room), alpha=pull)
    share = room.copy_(problem.residual_of()).mul_(-1 / len(problem.weights))
    return residual.addmm_(share if origin is None else share.add_(origin), A)


def _dual(problem: Problem, dtype: torch.dtype, device: torch.device) -> Fit:
    """In the space of all rows: with F = stack_t sqrt(a_t) Z_t (N, in) and N = T out,
    `H F (F^T F + e I)^(-1) = H (F F^T + e I)^(-1) F`. F itself is never formed.
    """
    T, (out, columns) = len(problem.weights), problem.shape
    roots = torch.tensor(problem.weights, dtype=torch.float64).to(device).sqrt()  # (T,)
    per_row = roots.repeat_interleave(out).to(dtype)  # (N,)
    products = _row_products(problem.sources, T, out, dtype, device)  # Z Z^T, (N, N)
    own = _own_blocks(problem, products, dtype) * per_row  # sqrt(a_t) X_t Z_t^T side by side, (out, N)
    K = products.mul_(per_row).mul_(per_row[:, None])  # F F^T
    ridge = problem.ridge + problem.relative_ridge * K.trace().item() / columns
    K.diagonal().add_(ridge)
    H = own
    if problem.pulls is not None:  # l_t Z_t = (l_t / sqrt(a_t)) F_t
        per_expert = torch.tensor(problem.pulls, dtype=torch.float64).to(device) / roots
        pulls = per_expert.nan_to_num_(posinf=0.0).repeat_interleave(out).to(dtype)
        H = own + torch.eye(out, dtype=dtype, device=device).repeat(1, T) * pulls
    inverse = invert(K)
    Q = inverse(H)
    trusted = inverse.diagnosis.trusts(K, H, Q)
    M = _times(Q * per_row, problem.sources, T, columns, dtype)
    if problem.prior is not None:
        means = torch.cat([problem.mean_of_columns(problem.sources(t, dtype)) for t in range(T)]) * per_row  # F 1 / in
        row = inverse((means * problem.prior)[None])  # c^T A^(-1) = f (F 1 / in)^T (F F^T + e I)^(-1) F
        M = with_rank_one(M, _times(row * per_row, problem.sources, T, columns, dtype)[0], problem.ones)

    if problem.residual_of is None or not trusted:
        return Fit(M, inverse.diagnosis, trusted)
    wide = problem.residual_of().to(dtype)
    products = torch.cat([wide @ problem.sources(t, dtype).T for t in range(T)], 1) * per_row  # X F^T
    mixed = _times((own - products / T) * per_row, problem.sources, T, columns, dtype)
    return Fit(M, inverse.diagnosis, trusted, mixed.sub_(wide, alpha=ridge / T))


def _row_products(sources: Experts, T: int, out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`Z Z^T` of all rows of all experts, (N, N), without a copy of them."""
    products = torch.empty(T, out, T, out, dtype=dtype, device=device)
    for s in range(T):
        Z = sources(s, dtype)
        symmetric_product(Z.T, products[s, :, s])
        for t in range(s):
            products[s, :, t] = Z @ sources(t, dtype).T
            products[t, :, s] = products[s, :, t].T
    return products.view(T * out, T * out)


def _own_blocks(problem: Problem, products: Float[Tensor, "N N"], dtype: torch.dtype) -> Float[Tensor, "out N"]:
    """`X_t Z_t^T` side by side."""
    T, out = len(problem.weights), problem.shape[0]
    if problem.targets is problem.sources:
        blocks = products.view(T, out, T, out)
        return torch.cat([blocks[t, :, t] for t in range(T)], 1)
    return torch.cat([problem.targets(t, dtype) @ problem.sources(t, dtype).T for t in range(T)], 1)


def _times(Q: Float[Tensor, "m N"], sources: Experts, T: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`Q stack_t Z_t`, (m, in)."""
    total = torch.zeros(len(Q), columns, dtype=dtype, device=Q.device)
    for t, part in enumerate(Q.view(len(Q), T, -1).unbind(1)):
        total.addmm_(part, sources(t, dtype))
    return total
