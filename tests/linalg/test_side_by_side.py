"""Work side by side gives what it gives one after the other, and leaves the thread counts alone."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Timer

import pytest
import torch
from oracles import relative_error

import acemerge
from acemerge.linalg.threads import side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_each_by_half_of_the_threads() -> None:
    torch.set_num_threads(2)
    assert list(side_by_side(lambda i: (i, torch.get_num_threads()), range(5), CPU)) == [(i, 1) for i in range(5)]
    assert torch.get_num_threads() == 2


def test_results_do_not_pile_up_behind_a_slow_one() -> None:
    torch.set_num_threads(2)
    begun, gate = list[int](), Event()

    def work(i: int) -> int:
        begun.append(i)
        if i == 0:
            gate.wait(60)
        return i

    Timer(0.2, gate.set).start()
    results = side_by_side(work, range(8), CPU)
    assert next(results) == 0
    assert sorted(begun) == [0, 1]
    assert list(results) == [*range(1, 8)]


def test_an_error_comes_out() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda i: 1 // i, [2, 1, 0, 3], CPU))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("rule", ["cart", "tsv_m", "iso_cts"])
def test_a_rule_gives_the_same_however_many_of_its_experts_are_worked_on_at_once(rule: str) -> None:
    deltas = torch.randn(5, 48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(acemerge.merge_deltas(deltas, rule).delta)
    assert all(relative_error(one, found[0]) < 1e-12 for one in found)
