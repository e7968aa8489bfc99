"""The tests' own choice among crossed parameters misses no pair."""

from itertools import product

import pytest
from crossed import crossed, pairs, pairwise, spread


@pytest.mark.parametrize("sizes", [(4,), (5, 2), (7, 2, 4), (36, 17, 3), (3, 2, 4, 3), (2, 2, 2, 2, 2)], ids=str)
def test_every_pair_is_held(sizes: tuple[int, ...]) -> None:
    rows = pairwise(sizes)
    assert pairs(rows) == pairs(product(*map(range, sizes)))
    assert len(set(rows)) == len(rows)
    assert len(rows) <= 2 * max(a * b for a, b in zip(sorted(sizes), sorted(sizes)[1:] or [1], strict=False))


def test_the_rest_of_the_product_is_torture() -> None:
    rare = pytest.param(9, id="rare", marks=pytest.mark.torture)
    names, cases = crossed(**{"a,b": [pytest.param(1, 2, id="x"), pytest.param(3, 4, id="y")]}, c=[5, 6, rare]).args
    assert names == "a,b,c"
    assert {case.id: [mark.name for mark in case.marks] for case in cases} == {
        "x-5": [], "x-6": [], "x-rare": ["torture"], "y-5": [], "y-6": [], "y-rare": ["torture"]
    }  # fmt: skip
    assert [case.values for case in cases][1] == (1, 2, 6)
    _, cases = crossed(a="xyz", b="xy", c="xy").args
    assert len(cases) == 12
    assert sum(not case.marks for case in cases) == 6
    _, cases = spread(a="xyz", b="xy").args
    assert [case.id for case in cases if not case.marks] == ["x-x", "y-y", "z-x"]
