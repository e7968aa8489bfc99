"""Code that builds what a file describes is stopped: by its parts, by its seconds, in any thread."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from acemerge.models.bounded import TooManyParts, TooManySeconds, bounded


def _endless() -> None:
    while True:
        with contextlib.suppress(Exception):  # whatever the code holds, it does not hold the bound
            sum(range(100))


def _stopped() -> None:
    with pytest.raises(TooManySeconds), bounded(parts=10, seconds=0.1):
        _endless()


def test_an_endless_loop_is_stopped_in_any_thread() -> None:
    _stopped()
    with ThreadPoolExecutor(1) as other:
        other.submit(_stopped).result()


def test_nothing_is_raised_behind_the_block() -> None:
    with bounded(parts=10, seconds=0.5):
        pass
    time.sleep(0.6)


def test_parts_are_counted_within_the_block_and_its_thread() -> None:
    with bounded(parts=8, seconds=60):
        nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False))  # 2 modules, 2 parameters, 3 buffers
        with ThreadPoolExecutor(1) as other:
            other.submit(nn.Sequential, *(nn.ReLU() for _ in range(100))).result()
    with pytest.raises(TooManyParts), bounded(parts=6, seconds=60):
        nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    nn.Sequential(*(nn.ReLU() for _ in range(100)))
