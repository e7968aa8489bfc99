"""Adapters compressed to the rank of the output first, and merged in the space that is left.

    D_t ~ P C_t Q^T,  C_t = P^T D_t Q (rank, rank);   M = P merge(C_1, .., C_T) Q^T

with orthonormal P (out, rank) and Q (in, rank) that hold most of all updates, each at length one. Source: He et al.
2026, Compress then Merge (arXiv 2606.03723) and its code, ZhengbaoHe/compress-then-merge, with its `beta` at 0; from
the factors' cores, as there. M has the rank by construction, and no singular value is cut from what the rule made.
Rotations, shares of entries and of the layer's size are then those of the cores.
"""

from __future__ import annotations

import torch

from acemerge.linalg.lowrank import LowRank, both_sides
from acemerge.linalg.shared import shared_spaces
from acemerge.methods.base import Layer, Method, Needs
from acemerge.methods.common_bases import own_entries
from acemerge.methods.factors import LowRankResult


def merge_compressed(method: Method, updates: LowRank, layer: Layer, dtype: torch.dtype, rank: int) -> LowRankResult:
    """Merge updates of low rank by a rule that looks at updates alone, to factors of at most this rank in `dtype`."""
    cores = both_sides(updates)
    counted = cores.values[layer.weights.to(cores.values.device) != 0]
    P, Q = shared_spaces(counted, min(rank, *cores.values.shape[1:]))
    result = method.merge(P.T @ cores.values @ Q, own_entries(layer))
    assert cores.Q_V is not None
    left, right = (cores.Q_U @ P) @ result.delta, (cores.Q_V @ Q).T
    return LowRankResult(left.to(dtype), right.to(dtype), result.stats)


def looks_at_updates_alone(needs: Needs) -> bool:
    """Whether a rule may be given updates that were turned."""
    return not (needs.base or needs.masks or needs.calibration)
