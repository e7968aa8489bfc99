"""Updates of low rank, `D_t = U_t V_t`, and the small orthonormal coordinates that hold all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acemerge.linalg.rounding import NULL
from acemerge.linalg.spectral import leading_singular
from acemerge.shapes import Float, Tensor

_SAME_SPACE = 1e-6  # how far apart, relative to their size, rows may be that count as spanning one space


@dataclass(frozen=True)
class Frame:
    """The layer behind cores: `shape` (out, in), and where the core C stands for `Q_U C Q_V^T`, `rows = Q_U^T 1` (p,)
    and `columns = Q_V^T 1` (q,), for rules that sum over a side. 1 (out,) lies in the span of Q_U. `row_probe` and
    `column_probe` are the same of `probe`, for what needs a direction that is special to nothing.
    """

    shape: tuple[int, int]
    rows: Float[Tensor, " p"]
    columns: Float[Tensor, " q"]
    row_probe: Float[Tensor, " p"]
    column_probe: Float[Tensor, " q"]

    @staticmethod
    def itself(shape: tuple[int, int], like: Tensor) -> Frame:
        """Of a layer in its own coordinates, Q_U and Q_V being I."""
        (rows, row_probe), (columns, column_probe) = (
            (like.new_ones(n, dtype=torch.float64), probe(n).to(like.device)) for n in shape
        )
        return Frame(shape, rows, columns, row_probe, column_probe)


def probe(n: int) -> Float[Tensor, " n"]:
    """A fixed vector in float64 that nothing special to a layer is at right angles to: `frac(i phi) - 1/2`."""
    golden = (5**0.5 - 1) / 2
    found: Tensor = (torch.arange(1, n + 1, dtype=torch.float64) * golden).frac() - 0.5
    return found


@dataclass(frozen=True)
class LowRank:
    """T updates of one layer, `D_t = U_t V_t`: `left` holds the U_t (out, r_t), `right` the V_t (r_t, in).

    Ranks may differ, and be zero; all scaling is in the factors.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left[0].shape[0], self.right[0].shape[1]

    @property
    def rank(self) -> int:
        """R, the ranks of all updates together: at least that of anything they span."""
        return sum(V.shape[0] for V in self.right)

    def transposed(self) -> LowRank:
        """The `D_t^T`."""
        return LowRank(tuple(V.T for V in self.right), tuple(U.T for U in self.left))

    def energies(self) -> Float[Tensor, " T"]:
        """`||D_t||_F^2 = <U_t^T U_t, V_t V_t^T>`, in float64."""
        pairs = [(U.double(), V.double()) for U, V in zip(self.left, self.right, strict=True)]
        return torch.stack([((U.T @ U) * (V @ V.T)).sum() for U, V in pairs])

    def full(self, dtype: torch.dtype) -> Float[Tensor, "T out in"]:
        """The D_t themselves."""
        D = torch.empty(len(self.left), *self.shape, dtype=dtype, device=self.left[0].device)
        for update, U, V in zip(D, self.left, self.right, strict=True):
            torch.mm(U.to(dtype), V.to(dtype), out=update)
        return D


@dataclass(frozen=True)
class Cores:
    """`D_t = Q_U C_t Q_V^T` with orthonormal Q_U (out, p) and Q_V (in, q); no Q_V stands for I."""

    values: Float[Tensor, "T p q"]
    Q_U: Float[Tensor, "out p"]
    Q_V: Float[Tensor, "in q"] | None
    frame: Frame

    def lifted(self, C: Float[Tensor, "p q"]) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Factors of `Q_U C Q_V^T`."""
        return (self.Q_U, C) if self.Q_V is None else (self.Q_U @ C, self.Q_V.T)


def both_sides(updates: LowRank) -> Cores:
    """Cores in float64, p <= 1 + R and q <= R: from `[1 U_1 .. U_T] = Q_U R_U` and `[V_1^T .. V_T^T] = Q_V R_V`,
    `C_t = R_U,t R_V,t^T` with the columns that belong to t.
    """
    Q_U, ones, *parts_U = _with_ones(updates.left)
    Q_V, parts_V = _basis(updates.transposed().left)
    cores = torch.stack([left @ right.T for left, right in zip(parts_U, parts_V, strict=True)])
    return Cores(cores, Q_U, Q_V, Frame(updates.shape, ones[:, 0], Q_V.sum(0), _probed(Q_U), _probed(Q_V)))


def left_side(updates: LowRank) -> Cores:
    """The same with Q_V = I: `C_t = R_U,t V_t` (p, in)."""
    Q_U, ones, *parts_U = _with_ones(updates.left)
    cores = torch.stack([left @ V.double() for left, V in zip(parts_U, updates.right, strict=True)])
    own = Frame.itself((len(Q_U), cores.shape[2]), cores)
    return Cores(cores, Q_U, None, Frame(updates.shape, ones[:, 0], own.columns, _probed(Q_U), own.column_probe))


def _probed(Q: Float[Tensor, "n p"]) -> Float[Tensor, " p"]:
    return Q.T @ probe(len(Q)).to(Q.device)


def _with_ones(blocks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Q, `Q^T 1` (p, 1) and the `Q^T block_t` of 1 and the blocks."""
    one = blocks[0].new_ones(len(blocks[0]), 1)  # of no block: an expert without an update has no columns
    Q, parts = _basis((one, *blocks))
    return Q, *parts


def _basis(blocks: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Orthonormal Q (n, p) with the span of the blocks (n, r_t) side by side, and the `Q^T block_t`.

    Dependent columns, as of experts that share a factor, add nothing to Q, for in a direction without any update a
    rule would meet rounding alone: what the columns, each at length one, have less of than 2^-21 of their most. Their
    sizes do not count: a small update has its directions, too.
    """
    X = torch.cat(blocks, 1).double()
    sizes = X.norm(dim=0)
    Q, R = torch.linalg.qr(X / torch.where(sizes > 0, sizes, 1))
    W, s, _ = torch.linalg.svd(R, full_matrices=False)
    W = W[:, s > s[0] * NULL]
    return Q @ W, (W.T @ R * sizes).split([block.shape[1] for block in blocks], 1)


def share_row_space(matrices: tuple[Tensor, ...]) -> bool:
    """Whether two or more matrices (r_t, in) have one row space, to 1e-6, that is not all of the space."""
    if len(matrices) < 2:
        return False
    spaces = [_row_space(V) for V in matrices]
    first = spaces[0]
    if len(first) == first.shape[1] or any(len(space) != len(first) for space in spaces):
        return False
    return all(float((B - (B @ first.T) @ first).norm()) <= _SAME_SPACE * len(B) ** 0.5 for B in spaces[1:])


def _row_space(V: Float[Tensor, "r in"]) -> Float[Tensor, "k in"]:
    """An orthonormal basis, directions of less than 1e-6 of the largest left out."""
    _, s, Vh = torch.linalg.svd(V.double(), full_matrices=False)
    space: Tensor = Vh[s > _SAME_SPACE * s[0]]
    return space


def truncated_factors(
    left: Float[Tensor, "out n"], right: Float[Tensor, "n in"], k: int
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"], float]:
    """Factors of the best approximation of `left right` of rank k or less, and the share of the energy that it loses:
    `sum_(i > k) s_i^2 / sum_i s_i^2`. From two thin QR and the SVD of `R_l R_r^T`; each factor carries `sqrt(s)`.
    """
    Q_l, R_l = torch.linalg.qr(left.double())
    Q_r, R_r = torch.linalg.qr(right.double().T)
    U, s, Vh = torch.linalg.svd(R_l @ R_r.T, full_matrices=False)
    root, energy = s[:k].sqrt(), s.square()
    lost = float(energy[k:].sum() / energy.sum()) if s[0] > 0 else 0.0
    return (Q_l @ (U[:, :k] * root)).to(left.dtype), ((root[:, None] * Vh[:k]) @ Q_r.T).to(right.dtype), lost


def best_factors(M: Float[Tensor, "out in"], k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"], float]:
    """The same for a matrix that is given as it is, from its leading singular triplets."""
    found = leading_singular(M, min(k, *M.shape))
    root = found.s[: found.rank].sqrt()
    left, right = found.U * root, root[:, None] * found.V.T
    energy = float(M.double().square().sum())
    lost = float((M.double() - left @ right).square().sum()) / energy if energy else 0.0
    return left.to(M.dtype), right.to(M.dtype), lost
