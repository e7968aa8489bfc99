"""The k-th largest magnitude of one tensor, or of a stream that is seen twice, exactly and without sorting.

A non-negative float32 grows with its bit pattern. A first pass counts the upper half of the bits, a second one
the lower half of those entries that share the upper half of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce

import torch

from acemerge.errors import NumericalError
from acemerge.linalg.rounding import NULL
from acemerge.shapes import Bool, Float, Int, Tensor

_LOW_BITS = 16
UPPER = 1 << 15  # the sign bit is clear
LOWER = 1 << _LOW_BITS
_BLOCK = 1 << 18  # entries that are looked at at once: few enough to take no memory to speak of
_SAMPLE = 1 << 15
# A sample leaves less than a thirtieth of many entries to be sorted, but where many are equal.
_GATHERED = 1 << 18
_SHARE = 16
_DEVIATIONS = 5


def magnitudes(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`|x|` in float32: the type in which magnitudes are ranked. NumericalError for what is beyond it."""
    sizes = x.abs().float()
    if x.dtype == torch.float64 and bool(sizes.isinf().any()):
        what = "has values beyond the range of float32, in which magnitudes are ranked"
        raise NumericalError("an update", what, "scale the updates to a size near 1, or use another rule")
    return sizes


def largest_entry(D: Float[Tensor, "*shape"]) -> float:
    """`max |D|`."""
    low, high = torch.aminmax(D)
    return max(-float(low), float(high))


def at_least(size: Float[Tensor, "*shape"], bound: float | Tensor) -> Bool[Tensor, "*shape"]:
    """`size >= bound`, for magnitudes; what is below it by rounding alone counts as equal."""
    return size >= bound * (1 - NULL)


def at_most(size: Float[Tensor, "*shape"], bound: float | Tensor) -> Bool[Tensor, "*shape"]:
    """`size <= bound` alike."""
    return size <= bound * (1 + NULL)


def upper_counts(x: Float[Tensor, "*shape"]) -> Int[Tensor, " upper"]:
    """How many entries there are for each upper half of a magnitude's bits."""
    return _sum(torch.bincount(bits >> _LOW_BITS, minlength=UPPER) for bits in _bits(x))


def lower_counts(x: Float[Tensor, "*shape"], upper: int) -> Int[Tensor, " lower"]:
    """The same for the lower half, of the entries whose upper half is `upper`."""
    return _sum(torch.bincount(bits[(bits >> _LOW_BITS) == upper] & (LOWER - 1), minlength=LOWER) for bits in _bits(x))


def kth_bin(counts: Int[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest entry, k from 1, and the entry's rank within that bin."""
    above = counts.flip(0).cumsum(0)  # entries in this bin and those above it, from the top
    position = int(torch.searchsorted(above, k))
    return len(counts) - 1 - position, k - (int(above[position - 1]) if position else 0)


def from_halves(upper: int, lower: int) -> float:
    """The magnitude with these two halves of bits."""
    return torch.tensor(upper << _LOW_BITS | lower, dtype=torch.int32).view(torch.float32).item()


def share_of(keep: float, n: int) -> int:
    """`int(keep n)`, at least 1; a product that falls short of a whole number by rounding counts as it."""
    return max(1, int(keep * n + 1e-6))


def kth_largest_magnitude(x: Float[Tensor, "*shape"], k: int) -> float:
    """The k-th largest of `|x|`, k from 1 to the number of entries, rounded to float32.

    A sample tells between which two magnitudes it lies, so that only the few entries between them need sorting.
    """
    flat = x.flatten()
    stride = len(flat) // _SAMPLE | 1  # odd: else it might see a few columns only
    low, high = _bracket(magnitudes(flat[::stride]), k / len(flat))
    above, between, room = 0, [], max(_GATHERED, len(flat) // _SHARE)
    for block in flat.split(_BLOCK):
        sizes = magnitudes(block)
        above += int((sizes > high).count_nonzero())
        between.append(sizes[(sizes >= low) & (sizes <= high)])
        room -= len(between[-1])
        if room < 0:  # counting takes no more memory where they are many
            return _by_counts(flat, k)
    inner = torch.cat(between)
    if 0 < k - above <= len(inner):
        return inner.kthvalue(len(inner) - (k - above) + 1).values.item()
    return _by_counts(flat, k)  # the sample is not like the rest


def _bracket(sample: Float[Tensor, " m"], share: float) -> tuple[Tensor, Tensor]:
    """Two of the sample's magnitudes that the one with this share of the entries above it lies between, most likely."""
    m = len(sample)
    spread = int(_DEVIATIONS * math.sqrt(m * share * (1 - share))) + 2
    ordered, position = sample.sort(descending=True).values, int(share * m)
    high = ordered[position - spread] if position >= spread else ordered.new_full((), math.inf)
    low = ordered[position + spread] if position + spread < m else ordered.new_zeros(())
    return low, high


def _by_counts(x: Float[Tensor, "*shape"], k: int) -> float:
    upper, rank = kth_bin(upper_counts(x), k)
    lower, _ = kth_bin(lower_counts(x, upper), rank)
    return from_halves(upper, lower)


def _bits(x: Tensor) -> Iterator[Tensor]:
    """The magnitudes' bits as int32, in blocks."""
    for block in x.flatten().split(_BLOCK):
        yield magnitudes(block).view(torch.int32)


def _sum(counts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, counts)
