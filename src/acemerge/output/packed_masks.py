"""Masks as they are stored: eight entries to a byte."""

from __future__ import annotations

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.shapes import Bool, Tensor

_BITS = torch.arange(8, dtype=torch.uint8)
_BLOCK = 1 << 20  # entries that are packed at a time, in whole bytes


def pack(mask: Bool[Tensor, "*shape"]) -> Tensor:
    """Eight entries to a byte, the first in the lowest bit: uint8 of (entries + 7) // 8."""
    entries = mask.flatten()
    packed = torch.empty((len(entries) + 7) // 8, dtype=torch.uint8)
    # One for all: what is freed in between is not joined again. No larger than the mask: it would leave as large a gap.
    room = torch.zeros(min(len(packed), _BLOCK // 8), 8, dtype=torch.uint8)
    for start in range(0, len(entries), _BLOCK):
        block = entries[start : start + _BLOCK]
        bytes_of = packed[start // 8 : (start + _BLOCK) // 8]
        bits = room[: len(bytes_of)]
        bits[-1] = 0  # what lies beyond the last entry
        bits.view(-1)[: len(block)] = block
        torch.sum(torch.bitwise_left_shift(bits, _BITS, out=bits), 1, dtype=torch.uint8, out=bytes_of)
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    """The mask that `pack` packed."""
    bits = ((packed[:, None] >> _BITS) & 1).flatten()
    return bits[: torch.Size(shape).numel()].bool().view(shape)


def mask_spec(spec: TensorSpec) -> TensorSpec:
    """What the packed mask of a tensor looks like in a file."""
    return TensorSpec(spec.name, torch.uint8, ((spec.count + 7) // 8,))
