"""No rule's result jumps under noise at the level of rounding, whatever the input: what decides must be in the input."""

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
    found = {}
    for case, D in INPUTS.items():
        before = merged(D, name, **params)
        found[case] = max(jump(merged(noisy(D, 1e-15, seed), name, **params), before, D) for seed in (1, 2))
    assert max(found.values()) < STEADY, found


@over_variants
def test_nor_does_the_rounding_of_float32(name: str, params: dict[str, Any]) -> None:
    if name == "ace" and not params:
        params = {"eps": 1e-2}  # the default's condition is 1e5
    left_to_sort = ("equal rows", "equal columns") if name == "mergekit_sum" else ()  # which of equals stay, as there
    found = {}
    for case, D in ((case, D.float()) for case, D in INPUTS.items() if case not in left_to_sort):
        found[case] = jump(merged(noisy(D, 6e-8), name, **params), merged(D, name, **params), D)
        found[case, "float64"] = jump(merged(D.double(), name, **params), merged(D, name, **params), D)
    assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("processor", ["COMPATIBLE", "AVX2"])
def test_another_processor_and_thread_count_give_the_same(processor: str, threads: int, tmp_path: Path) -> None:
    script, file = Path(__file__).parents[1] / "support" / "awkward.py", tmp_path / "results.pt"
    environment = {**os.environ, "MKL_CBWR": processor}
    subprocess.run([sys.executable, script, file, str(threads)], check=True, env=environment, capture_output=True)
    expected, found = all_results(), torch.load(file)
    assert found.keys() == expected.keys()
    assert not {key: jump(found[key], M, M) for key, M in expected.items() if (found[key] - M).norm() > STEADY}
