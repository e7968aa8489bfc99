"""No rule jumps under noise at the level of rounding, whatever the input: what decides must be in the input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import INPUTS, VARIANTS, all_results, jump, noisy
from conformance import merged

over_variants = pytest.mark.parametrize(("name", "params"), VARIANTS, ids=[f"{name} {p or ''}" for name, p in VARIANTS])
# A jump is of the size of the updates. A solve may magnify noise of 1e-15 by its condition, up to 1e6 here.
STEADY = 1e-8


@over_variants
def test_noise_at_the_level_of_rounding_changes_no_result(name: str, params: dict[str, Any]) -> None:
    found: dict[Any, float] = {}
    for case, D in INPUTS.items():
        before = merged(D, name, **params)
        found[case] = jump(merged(noisy(D, 1e-15), name, **params), before, D)
    assert max(found.values()) < STEADY, found


@over_variants
def test_nor_does_the_rounding_of_float32(name: str, params: dict[str, Any]) -> None:
    if name == "ace":
        params = {"eps": 1e-2, **params}  # the default's condition is 1e5
    left_to_sort = ("equal rows", "equal columns") if name == "mergekit_sum" else ()  # which of equals stay, as there
    found: dict[Any, float] = {}
    for case, D in ((case, D.float()) for case, D in INPUTS.items() if case not in left_to_sort):
        before = merged(D, name, **params)
        found[case] = jump(merged(noisy(D, 6e-8), name, **params), before, D)
        found[case, "float64"] = jump(merged(D.double(), name, **params), before, D)
    assert max(found.values()) < 1e-3, found


@pytest.fixture(scope="module")
def results() -> dict[str, torch.Tensor]:
    return all_results()


@pytest.mark.parametrize(("processor", "threads"), [("COMPATIBLE", "1"), ("AVX2", "2")])
def test_another_processor_and_thread_count_give_the_same(
    processor: str, threads: str, results: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    script, file = Path(__file__).parents[1] / "support" / "awkward.py", tmp_path / "results.pt"
    environment = {**os.environ, "MKL_CBWR": processor, "OMP_NUM_THREADS": threads}
    subprocess.run([sys.executable, script, file], check=True, env=environment)
    found = torch.load(file)
    assert found.keys() == results.keys()
    assert not {key: jump(found[key], M, M) for key, M in results.items() if (found[key] - M).norm() > STEADY}
