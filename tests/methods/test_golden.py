"""Every rule against the reference outputs in tests/methods/golden: inputs `deltas`, float64 results by rule name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden import contents
from oracles import EXACT, relative_error

import acemerge

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.npz"))
CASES = [
    pytest.param(file, key, id=f"{file.stem}-{key}")
    for file in GOLDEN
    for key in np.load(file).files
    if key.split("__")[0] in acemerge.METHODS
]


def _merge(file: Path, key: str, dtype: torch.dtype) -> tuple[acemerge.LayerResult, torch.Tensor]:
    data = np.load(file)
    name, _, setting = key.partition("__")
    params = dict([setting.split("=")]) if setting else EXACT.get(name, {})
    deltas = torch.from_numpy(data["deltas"]).to(dtype)
    return acemerge.merge_deltas(deltas, name, **params), torch.from_numpy(data[key])


def test_there_are_golden_files() -> None:
    covered = {case.values[1].split("__")[0] for case in CASES}
    assert covered >= {"ace", "actmat", "tact", "wudi", "swudi_a", "cart", "tsv_m", "iso_c", "iso_cts", "average"}
    assert covered >= {"anchored", "kron"}
    assert len(GOLDEN) >= 4


@pytest.mark.parametrize(("file", "key"), CASES)
def test_float64_matches_the_reference(file: Path, key: str) -> None:
    result, expected = _merge(file, key, torch.float64)
    assert relative_error(result.delta, expected) < 1e-8


@pytest.mark.parametrize(("file", "key"), CASES)
def test_float32_stays_close_to_the_reference(file: Path, key: str) -> None:
    result, expected = _merge(file, key, torch.float32)
    assert result.delta.dtype == torch.float32
    assert relative_error(result.delta, expected) < 1e-4


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_gamma_is_the_papers(file: Path) -> None:
    result, _ = _merge(file, "ace", torch.float64)
    assert result.stats["gamma"] == pytest.approx(float(np.load(file)["gamma"]), abs=1e-12)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_oracles_give_the_files(file: Path) -> None:
    made, stored = contents(file), np.load(file)
    assert set(made) == set(stored.files)
    for key, value in made.items():
        assert relative_error(value, torch.from_numpy(stored[key])) < 1e-10
