"""The two spaces that hold most of several matrices together."""

from __future__ import annotations

import torch

from acemerge.shapes import Float, Tensor

_STEPS = 200
_STILL = 1e-12  # of what is held: a step that gains less is the last


def shared_spaces(C: Float[Tensor, "T p q"], k: int) -> tuple[Float[Tensor, "p k"], Float[Tensor, "q k"]]:
    """Orthonormal P and Q that maximise `sum_t ||P^T C_t Q||_F^2 / ||C_t||_F^2`, to a maximum near the leading singular
    vectors of the C_t side by side and on top of one another: a Tucker decomposition of two modes, by turns.
    """
    sizes = C.flatten(1).norm(dim=1)
    units = C[sizes > 0] / sizes[sizes > 0, None, None]
    P, Q, held = _leading(units, k), _leading(units.mT, k), 0.0
    for _ in range(_STEPS):
        P = _leading(units @ Q, k)
        Q = _leading(units.mT @ P, k)
        before, held = held, float((P.T @ units @ Q).square().sum())
        if held - before <= _STILL * held:
            break
    return P, Q


def _leading(C: Float[Tensor, "T p n"], k: int) -> Float[Tensor, "p k"]:
    """The k leading left singular vectors of the C_t side by side."""
    vectors: Tensor = torch.linalg.eigh((C @ C.mT).sum(0))[1].flip(1)[:, :k]
    return vectors
