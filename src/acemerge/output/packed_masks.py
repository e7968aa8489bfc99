"""Masks as they are stored: eight entries to a byte."""

from __future__ import annotations

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.shapes import Bool, Tensor

_BITS = torch.arange(8, dtype=torch.uint8)


def pack(mask: Bool[Tensor, "*shape"]) -> Tensor:
    """Eight entries to a byte, the first in the lowest bit: uint8 of (entries + 7) // 8."""
    bits = mask.flatten().to(device="cpu", dtype=torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << _BITS).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    """The mask that `pack` packed."""
    bits = ((packed[:, None] >> _BITS) & 1).flatten()
    return bits[: torch.Size(shape).numel()].bool().view(shape)


def mask_spec(spec: TensorSpec) -> TensorSpec:
    """What the packed mask of a tensor looks like in a file."""
    return TensorSpec(spec.name, torch.uint8, ((spec.count + 7) // 8,))
