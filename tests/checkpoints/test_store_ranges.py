"""Byte ranges: whatever is asked for is filled, with few requests and none of them large."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acemerge.checkpoints import ranges


@st.composite
def runs_of(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Offsets and the lengths of the buffers behind each, in any order."""
    sizes = st.lists(st.integers(0, 900), min_size=1, max_size=4)
    return draw(st.lists(st.tuples(st.integers(0, 5000), sizes), max_size=8))


@given(runs_of())
def test_every_buffer_gets_its_bytes(wanted: list[tuple[int, list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(ranges, "LARGEST", 256)
        small.setattr(ranges, "_GAP", 64)
        content = random.Random(0).randbytes(5000 + 4 * 900)
        asked: list[tuple[int, int]] = []

        def read(start: int, end: int) -> bytes:
            asked.append((start, end))
            return content[start:end]

        buffers = [(offset, [bytearray(size) for size in sizes]) for offset, sizes in wanted]
        ranges.fill([(offset, [memoryview(b) for b in each]) for offset, each in buffers], read)
        for offset, each in buffers:
            size = sum(map(len, each))
            assert b"".join(each) == content[offset : offset + size]
        assert all(0 < end - start <= 256 for start, end in asked)


def test_what_is_near_is_read_at_once() -> None:
    buffers = [memoryview(bytearray(10)) for _ in range(6)]
    far = 3 * ranges._GAP
    runs = [(0, buffers[:2]), (100, buffers[2:3]), (far, buffers[3:5]), (10, buffers[5:])]
    assert [(r.start, r.end) for r in ranges.requests(runs)] == [(0, 110), (far, far + 20), (10, 20)]
