"""Slow, obvious float64 versions of the rules, written from the formulas as they are printed.

`deltas` are (T, out, in). An expert's weight multiplies its task vector in the elementwise and spectral rules, and its
term of the objective in the covariance family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

# What makes a rule that iterates as exact as its oracle.
EXACT = {
    "kron": {"steps": 1000, "tol": 1e-14, "keep": 1.0},
    "kron_auto": {"steps": 1000, "tol": 1e-14},
    "kfac": {"steps": 1000, "tol": 1e-14},
    "cauchy": {"steps": 5, "stop": 1e-14, "jitter": 0.0},
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; the plain norm where that is zero."""
    difference = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    return float(difference / scale if scale > 0 else difference)


def matrix_with_condition(out: int, cols: int, condition: float, generator: torch.Generator) -> Tensor:
    """A random (out, in) float64 matrix with singular values from 1 down to 1 / condition."""
    r = min(out, cols)
    U = torch.linalg.qr(torch.randn(out, r, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(cols, r, generator=generator, dtype=torch.float64))[0]
    return U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64) @ V.T


@cache
def task_vectors(T: int, shape: tuple[int, int], condition: float = 100.0, seed: int = 0) -> Tensor:
    """(T, out, in) float64: singular values well apart, entries as small as a fine-tune's, sizes that differ.

    The same tensor on every call: leave it as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [0.1, 0.2, 0.05, 0.15][:T]
    return torch.stack([size * matrix_with_condition(*shape, condition, generator) for size in sizes])


def weighted(deltas: Tensor, weights: Sequence[float] | None) -> Tensor:
    """w_t D_t in float64."""
    return deltas.double() * factors(len(deltas), weights)[:, None, None]


def factors(T: int, weights: Sequence[float] | None) -> Tensor:
    return torch.ones(T, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)


# --- elementwise rules ---------------------------------------------------------------------------------------


def average(deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    return weighted(deltas, weights).sum(0) / factors(len(deltas), weights).sum()


def task_arithmetic(deltas: Tensor, weights: Sequence[float] | None = None, scale: float = 0.3) -> Tensor:
    return scale * weighted(deltas, weights).sum(0)


def largest(D: Tensor, share: float) -> Tensor:
    """Which entries are among the top `share` by magnitude, and those equal to the last of them."""
    count = int(share * D.numel())
    return D.abs() >= D.abs().flatten().sort(descending=True).values[count - 1] if count else torch.zeros_like(D).bool()


def elect(D: Tensor) -> Tensor:
    """Per entry, the mean of the non-zero values that have the sign of the sum; the majority's where it is zero."""
    sign = D.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agrees = D.sign() == sign  # zeros too where sign is 0, which changes nothing
    return torch.where(agrees, D, 0).sum(0) / agrees.sum(0).clamp(min=1)


def ties(deltas: Tensor, weights: Sequence[float] | None = None, keep: float = 0.2) -> Tensor:
    D = weighted(deltas, weights)
    return elect(torch.stack([torch.where(largest(d, keep), d, 0) for d in D]))


def breadcrumbs(
    deltas: Tensor, weights: Sequence[float] | None = None, density: float = 0.9, gamma: float = 0.01
) -> Tensor:
    total = torch.zeros_like(deltas[0]).double()
    for d in weighted(deltas, weights):
        descending = d.abs().flatten().sort(descending=True).values
        skipped, kept = int(gamma * d.numel()), int(density * d.numel())
        inside = (d.abs() <= descending[skipped]) & (d.abs() >= descending[skipped + kept - 1])
        total += torch.where(inside, d, 0)
    return total


def consensus(deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 0.4) -> Tensor:
    D = weighted(deltas, weights)
    total = D.sum(0)
    votes = sum((d.abs() > lam * (total - d).abs()).int() for d in D)
    return torch.where(votes >= min(2, len(D)), total, 0)


def emr(deltas: Tensor, weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The unified update M, each expert's mask, each expert's lambda."""
    D = weighted(deltas, weights)
    sign = D.sum(0).sign()
    M = sign * torch.where(D.sign() == sign, D.abs(), 0).amax(0)
    masks = D * M > 0
    lambdas = torch.stack([d.abs().sum() / (mask * M).abs().sum() for d, mask in zip(D, masks, strict=True)])
    return M, masks, lambdas


def model_stock(deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    D = weighted(deltas, weights)
    T = len(D)
    if T == 1:
        return D[0]
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in combinations(D, 2)]
    c = sum(cosines) / len(cosines)
    return T * c / (1 + (T - 1) * c) * D.mean(0)


# --- rules on the sphere: they merge weights, W_t = W_0 + D_t -------------------------------------------------


def slerp(deltas: Tensor, weights: Sequence[float] | None = None, base: Tensor | None = None, t: float = 0.5) -> Tensor:
    D = weighted(deltas, weights)
    W0 = torch.zeros_like(D[0]) if base is None else base.double()
    first, second = (W0, W0 + D[0]) if len(D) == 1 else W0 + D
    cosine = (first * second).sum() / (first.norm() * second.norm())
    if cosine.abs() > 0.9995:
        return (1 - t) * first + t * second - W0
    a = torch.acos(cosine)
    return (torch.sin((1 - t) * a) * first + torch.sin(t * a) * second) / torch.sin(a) - W0


def karcher(deltas: Tensor, weights: Sequence[float] | None = None, base: Tensor | None = None) -> Tensor:
    W0 = torch.zeros_like(deltas[0]).double() if base is None else base.double()
    W = (W0 + deltas.double()).flatten(1)
    a = factors(len(W), weights) / factors(len(W), weights).sum()
    points = W / W.norm(dim=1, keepdim=True)
    u = a @ points / (a @ points).norm()
    for _ in range(500):
        cosines = points @ u
        away = points - cosines[:, None] * u  # tangent at u, of length sin(angle)
        angles = torch.atan2(away.norm(dim=1), cosines)
        step = a @ (away * (angles / away.norm(dim=1).clamp(min=1e-300))[:, None])
        if step.norm() < 1e-14:
            return ((a @ W.norm(dim=1)) * u).view_as(W0) - W0
        u = torch.cos(step.norm()) * u + torch.sin(step.norm()) * step / step.norm()
    raise ArithmeticError("no convergence")


# --- spectral rules ------------------------------------------------------------------------------------------


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(X, full_matrices=False)


def polar(X: Tensor) -> Tensor:
    U, _, Vh = svd(X)
    return U @ Vh


def cart(
    deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 1.5, k_frac: float = 0.08
) -> Tensor:  # fmt: skip
    D = weighted(deltas, weights)
    k = max(1, int(k_frac * min(D[0].shape)))
    M = D.mean(0)
    for d in D:
        U, s, Vh = svd(d - D.mean(0))
        M = M + lam * U[:, :k] @ s[:k].diag() @ Vh[:k]
    return M


def tsv_m(deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    D = weighted(deltas, weights)
    k = max(1, min(D[0].shape) // len(D))
    parts = [svd(d) for d in D]
    U = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    s = torch.cat([s[:k] for _, s, _ in parts])
    V = torch.cat([vh[:k].T for _, _, vh in parts], 1)
    return polar(U) @ s.diag() @ polar(V).T


def iso_c(deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    U, s, Vh = svd(weighted(deltas, weights).sum(0))
    return s.mean() * U @ Vh


def iso_cts(deltas: Tensor, weights: Sequence[float] | None = None, common: float = 0.8) -> Tensor:
    D = weighted(deltas, weights)
    T, r = len(D), min(D[0].shape)
    k0 = int(common * r)
    p = round((r - k0) / T) * T
    k, q = r - p, p // T
    Uc, sc, Vhc = svd(D.sum(0))
    Uc = Uc[:, :k]
    parts = [svd(d - Uc @ (Uc.T @ d)) for d in D]
    U = torch.cat([*(u[:, :q] for u, _, _ in parts), Uc], 1)
    s = torch.cat([*(s[:q] for _, s, _ in parts), sc[:k]])
    V = torch.cat([*(vh[:q].T for _, _, vh in parts), Vhc[:k].T], 1)
    return s.mean() * polar(U) @ polar(V).T


def dc_merge(
    deltas: Tensor, weights: Sequence[float] | None = None, top: float = 1e-3, smooth: str = "none"
) -> Tensor:  # fmt: skip
    D = weighted(deltas, weights)
    T, k = len(D), max(1, min(D[0].shape) // len(D))
    parts = [svd(d) for d in D]
    P, Q = polar(torch.cat([u[:, :k] for u, _, _ in parts], 1)), polar(torch.cat([vh[:k].T for *_, vh in parts], 1))
    cores = []
    for u, s, vh in parts:
        s = s[:k]
        if smooth != "none":
            steepest = 1.0 if smooth == "mean" else min(5.0, float(s[0] / s[-1]))
            ramp = torch.linspace(steepest, 1.0, k, dtype=torch.float64)
            s = s.sum() * ramp / ramp.sum()
        core = P.T @ u[:, :k] @ s.diag() @ vh[:k] @ Q
        cores.append(torch.where(largest(core, max(top, 1 / core.numel())), core, 0))
    merged = torch.zeros_like(cores[0])
    for i in range(T * k):
        for j in range(T * k):
            total = sum(core[i, j] for core in cores)
            agreeing = [core[i, j] for core in cores if core[i, j] * total > 0]
            if agreeing and i // k == j // k:
                merged[i, j] = sum(agreeing) / len(agreeing)
    return P @ merged @ Q.T


def svc(M: Tensor, deltas: Tensor, weights: Sequence[float] | None = None, a: float | None = None) -> Tensor:
    """Calibrates another rule's M."""
    T = len(deltas)
    a = 1 / T if a is None else a
    U, s, Vh = svd(M)
    rows = U.T @ M  # row r is u_r^T M
    owns = [U.T @ d for d in weighted(deltas, weights)]
    for r in range(len(s)):
        q = [float(rows[r] @ own[r] / own[r].square().sum()) for own in owns]
        s[r] = s[r] * T / sum(max(a, value) for value in q)
    return U @ s.diag() @ Vh


# --- covariance family ---------------------------------------------------------------------------------------


def actmat(
    deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 0.0, p: int = 0, keep: float = 1.0
) -> Tensor:  # fmt: skip
    """M = (sum_t D_t G_t) pinv(sum_t G_t); G_t from the top `keep` entries of D_t, which makes it tact."""
    D = deltas.double()
    trimmed = [torch.where(largest(d, keep), d, 0) for d in D]
    n = [d.square().sum() for d in D]
    G = [w * x.T @ x / e ** (p / 2) for w, x, e in zip(factors(len(D), weights), trimmed, n, strict=True)]
    total = sum(G)
    ridge = lam * total.diag().mean() * torch.eye(len(total), dtype=torch.float64)
    return sum(d @ g for d, g in zip(D, G, strict=True)) @ torch.linalg.pinv(total + ridge, hermitian=True)


def cauchy(
    deltas: Tensor, weights: Sequence[float] | None = None, tol: float = 0.3, jitter: float = 0.0, side: str = "input",
    steps: int = 5,
) -> Tensor:  # fmt: skip
    """Over actmat, for so many steps."""
    if side == "output":
        return cauchy(deltas.mT, weights, tol, jitter, steps=steps).T
    D, w = deltas.double(), factors(len(deltas), weights)
    n = torch.stack([d.square().sum() for d in D])
    unit = torch.stack([(d @ d.T).square().sum() for d in D]).div(n).mean()
    a, M = torch.ones(len(D), dtype=torch.float64), D[0]
    for _ in range(steps + 1):
        G = [f * x * d.T @ d for f, x, d in zip(w, a, D, strict=True)]
        ridge = jitter * sum(G).diag().mean() * torch.eye(D.shape[2], dtype=torch.float64)
        right = sum(d @ g for d, g in zip(D, G, strict=True))
        M = right @ torch.linalg.pinv(sum(G) + ridge, hermitian=True)
        q = torch.stack([((M - d) @ d.T).square().sum() for d in D])
        a = 1 / (q + tol * n * unit)
    return M


def regmean(deltas: Tensor, moments: Tensor, weights: Sequence[float] | None = None, a: float = 0.9) -> Tensor:
    """M = (sum_t D_t G_t) (sum_t G_t)^(-1), entries of G_t off the diagonal times a."""
    eye = torch.eye(deltas.shape[2], dtype=torch.float64)
    G = [
        w * torch.where(eye == 1, S, a * S)
        for w, S in zip(factors(len(deltas), weights), moments.double(), strict=True)
    ]
    return sum(d @ g for d, g in zip(deltas.double(), G, strict=True)) @ torch.linalg.inv(sum(G))


def kfac(
    deltas: Tensor, moments: Tensor, weights: Sequence[float] | None = None, lam: float = 0.01
) -> Tensor:  # fmt: skip
    """The dense system of the update as a vector; `moments` are those of the inputs, then of the outputs."""
    D, w, (out, cols) = deltas.double(), factors(len(deltas), weights), deltas.shape[1:]
    if len(D) == 1:
        return D[0]
    S, A = (
        [m.view(n, n) / m.view(n, n).diag().mean() for m in part.double()]
        for n, part in zip((cols, out), moments.split([cols**2, out**2], 1), strict=True)
    )
    L, R = (
        sum(f * side for f, side in zip(w, each, strict=True)) / w.sum() ** 0.5
        + 0.1 * w.sum() ** 0.5 * torch.eye(len(each[0]), dtype=torch.float64)
        for each in (A, S)
    )
    H = sum(f * torch.kron(a, s) for f, a, s in zip(w, A, S, strict=True))
    B = sum(f * a @ d @ s for f, a, d, s in zip(w, A, D, S, strict=True)).flatten()
    X = torch.linalg.solve(H + lam * torch.kron(L, R), B)
    return ((X @ B) / (X @ H @ X) * X).view_as(D[0])


def esm(
    deltas: Tensor, moments: Tensor, weights: Sequence[float] | None = None, p: float = 0.15
) -> Tensor:  # fmt: skip
    """By the singular vectors of `Z_t D_t^T`, any Z_t with `Z_t^T Z_t` the moments."""
    D = weighted(deltas, weights)
    T, out = D.shape[:2]
    k, norms, us, vs = max(1, out // T), [d.norm() for d in D], [], []
    for d, G in zip(D, moments.double(), strict=True):
        Z = torch.linalg.cholesky(G).T
        _, s, E = torch.linalg.svd(Z @ d.T)
        e = torch.nn.functional.pad(s.square(), (0, max(0, out - len(s))))[:k]
        g = (e / e.mean()) ** p
        g = g / g.mean()
        us.append(E[:k].T * g)
        vs.append(E[:k] @ d * d.norm() ** 2 * g[:, None])
    U, V = torch.cat(us, 1), torch.cat(vs) / (sum(norms) / T) ** 2
    V = V * (V.norm(dim=0) / V.norm(dim=0).mean()) ** 2
    return 2 * torch.linalg.svdvals(U).mean() * torch.linalg.svdvals(V).mean() * polar(U) @ polar(V)


def fisher(deltas: Tensor, moments: Tensor, weights: Sequence[float] | None = None, floor: float = 1e-6) -> Tensor:
    F = [w * (f + floor) for w, f in zip(factors(len(deltas), weights), moments.double(), strict=True)]
    return sum(d * f for d, f in zip(deltas.double(), F, strict=True)) / sum(F)


def wudi(deltas: Tensor, weights: Sequence[float] | None = None, steps: int = 300, lr: float = 1e-5) -> Tensor:
    D, w = deltas.double(), factors(len(deltas), weights)
    M = weighted(deltas, weights).sum(0).requires_grad_()
    adam = torch.optim.Adam([M], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss = sum(f * ((M - d) @ d.T).square().sum() / d.square().sum() for f, d in zip(w, D, strict=True))
        loss.backward()
        adam.step()
    return M.detach()


def swudi_a(deltas: Tensor, weights: Sequence[float] | None = None, anchor: str = "sum") -> Tensor:
    D, w = deltas.double(), factors(len(deltas), weights)
    A = sum(f * d.T @ d / d.square().sum() for f, d in zip(w, D, strict=True))
    B = sum(f * d @ d.T @ d / d.square().sum() for f, d in zip(w, D, strict=True))
    X0 = weighted(deltas, weights).sum(0) if anchor == "sum" else average(deltas, weights)
    V, ell, _ = torch.linalg.svd(A)  # symmetric and positive: its singular values are its eigenvalues, descending
    K = math.ceil(ell.sqrt().sum() ** 2 / ell.sum())
    V, ell = V[:, :K], ell[:K].clamp(min=1e-8 * ell[0])
    return X0 - X0 @ V @ V.T + B @ V @ (1 / ell).diag() @ V.T


def ace_auto(deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Every second moment shrunk by the formula of oracle approximating shrinkage, of its eigenvalues."""
    D, w = deltas.double(), factors(len(deltas), weights)
    n, p = D.shape[1:]
    R = []
    for f, d in zip(w, D, strict=True):
        S = d.T @ d / d.square().sum()
        squares = torch.linalg.svdvals(S).square().sum().item()
        low = (n + 1 - 2 / p) * (squares - 1 / p)
        rho = min(0.99, ((1 - 2 / p) * squares + 1) / low) if p > 1 and low > 0 else 0.99
        R.append(f * ((1 - rho) * S + rho / p * torch.eye(p, dtype=torch.float64)))
    return sum(d @ r for d, r in zip(D, R, strict=True)) @ torch.linalg.inv(sum(R))


def anchored(deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 1.0, p: int = 1) -> Tensor:
    D, w = deltas.double(), factors(len(deltas), weights)
    G = [f * d.T @ d / d.square().sum() ** (p / 2) for f, d in zip(w, D, strict=True)]
    ridge = lam * sum(G).diag().mean() * torch.eye(D.shape[2], dtype=torch.float64)
    pulled = sum(d @ g for d, g in zip(D, G, strict=True)) + weighted(deltas, weights).sum(0) @ ridge
    return pulled @ torch.linalg.inv(sum(G) + ridge)


def two_sides(D: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """A and S of every update, of all eigenvalues, those beyond the k largest at their mean."""

    def root(vectors: Tensor, s: Tensor) -> Tensor:
        values = torch.nn.functional.pad(s, (0, len(vectors) - len(s)))
        values = torch.cat([values[:k], values[k:].mean().expand(len(values[k:]))])
        return vectors @ (values / values.mean()).diag() @ vectors.T

    sides = []
    for d in D:
        U, s, Vh = torch.linalg.svd(d)
        sides.append((root(U, s), root(Vh.T, s)))
    return sides


def kron(
    deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 0.1, keep: float = 1.0, fewest: int = 64
) -> Tensor:
    """The dense system of the update as a vector, row after row: A M S is (A kron S) vec(M), as S is symmetric."""
    D, w = deltas.double(), factors(len(deltas), weights)
    ridge = lam * w.sum()
    system = ridge * torch.eye(D[0].numel(), dtype=torch.float64)
    right = ridge * weighted(deltas, weights).sum(0)
    for f, d, (A, S) in zip(w, D, two_sides(D, max(fewest, int(keep * min(D.shape[1:])))), strict=True):
        system += f * torch.kron(A, S)
        right = right + f * A @ d @ S
    return torch.linalg.solve(system, right.flatten()).view_as(D[0])


def dissent(deltas: Tensor, weights: Sequence[float] | None = None) -> float:
    """1 less the energy of the mean of the updates over the mean of their energies, each by its share of the energy."""
    D, w = deltas.double(), factors(len(deltas), weights).abs()
    n = D.flatten(1).square().sum(1)
    p = w * n / (w * n).sum()
    return float(1 - torch.einsum("t,tij->ij", p, D).square().sum() / (p * n).sum())


def weights_size(deltas: Tensor, base: Tensor, weights: Sequence[float] | None = None) -> float:
    """The energy of the base and the mean one of the updates."""
    w = factors(len(deltas), weights).abs()
    return float(base.double().square().sum() + (w * deltas.double().flatten(1).square().sum(1)).sum() / w.sum())


def trust(
    X: Tensor, deltas: Tensor, base: Tensor, weights: Sequence[float] | None = None, step: float = 0.25
) -> Tensor:
    moved = dissent(deltas, weights) * X.double().square().sum() / weights_size(deltas, base, weights)
    return X.double() / (1 + moved / step**2).sqrt()


def kron_auto(
    deltas: Tensor, weights: Sequence[float] | None = None, lam: float = 1.0, keep: float = 0.25, fewest: int = 64,
    base: Tensor | None = None, step: float = 0.25,
) -> Tensor:  # fmt: skip
    """The dense system, as `kron`'s."""
    D, w = deltas.double(), factors(len(deltas), weights)
    if len(D) == 1:
        return D[0]
    sides = two_sides(D, max(fewest, int(keep * min(D.shape[1:]))))
    if base is not None:
        r = dissent(D, weights) * D.flatten(1).square().sum(1) / weights_size(D, base, weights)
        even = (r**2 / (r**2 + step**4)).tolist()
        sides = [
            tuple((1 - e) * side + e * torch.eye(len(side), dtype=torch.float64) for side in pair)
            for e, pair in zip(even, sides, strict=True)
        ]
    L, R = (
        sum(f * side for f, side in zip(w, each, strict=True)) / w.sum() ** 0.5
        + 0.1 * w.sum() ** 0.5 * torch.eye(len(each[0]), dtype=torch.float64)
        for each in zip(*sides, strict=True)
    )
    H = sum(f * torch.kron(A, S) for f, (A, S) in zip(w, sides, strict=True))
    B = sum(f * A @ d @ S for f, d, (A, S) in zip(w, D, sides, strict=True))
    X = torch.linalg.solve(H + lam * torch.kron(L, R), B.flatten())
    b, h = X @ B.flatten(), X @ H @ X
    n = sum(f * (d * (A @ d @ S)).sum() for f, d, (A, S) in zip(w, D, sides, strict=True))
    N = (b / h * b**2 / (h * n) * X).view_as(D[0])
    return N if base is None else trust(N, D, base, weights, step)


def ace(
    deltas: Tensor, weights: Tensor | None = None, eps: float = 1e-5, tau: float = 0.3, k_frac: float = 0.3,
    ablation: str = "E4",
) -> Tensor:  # fmt: skip
    """arXiv 2603.02945: every Gram matrix formed, a general inverse, a full SVD."""
    D = deltas.double()
    T, out, cols = D.shape
    w = torch.ones(T, dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    eye = torch.eye(cols, dtype=torch.float64)
    n = torch.stack([(d**2).sum() for d in D])
    logs = torch.log(n + 1e-12)
    hetero = T > 1 and ablation != "E1" and bool(logs.var() / (logs.mean() ** 2 + 1e-12) > tau)
    C = D - D.mean(1, keepdim=True)
    S = C.mT @ C
    z = torch.stack([s.trace() for s in S]) if hetero else torch.ones(T, dtype=torch.float64)
    S = w[:, None, None] * S / z[:, None, None]
    R = S + (w * eps / z)[:, None, None] * eye
    P = torch.zeros_like(eye)
    if ablation in ("E3", "E4"):
        c = S.sum(0).sum(0) / cols
        P = torch.ones(cols, 1, dtype=torch.float64) @ (c / n.mean() if hetero else c)[None]
    pre = (C @ R).sum(0) @ torch.linalg.inv(R.sum(0) + P)
    if not hetero or ablation != "E4":
        return pre
    res = (D @ (S - R.sum(0) / T)).sum(0)
    U, s, Vh = torch.linalg.svd(res + pre, full_matrices=False)
    k = int(min(out, cols) * k_frac)
    return pre if k == 0 else pre + s[:k].mean() * U[:, :k] @ Vh[:k]
