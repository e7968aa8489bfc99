"""Devices that no machine of ours has: what they lack goes to the host, and nothing strays there beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pocket
import pytest
import torch
from builders import PlainModel, load_folder
from conformance import RULES, accepted, measurements
from crossed import crossed, spread
from oracles import relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.engine.devices import find_devices
from acemerge.errors import UsageError
from acemerge.methods import Status

Call = Callable[..., Any]

# Rules of sums and products in float32, which every device has. All others factor, solve or multiply in float64.
WHOLLY_THERE = {
    "average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "consensus", "emr",
    "wudi", "fisher", "mergekit_linear", "mergekit_sum", "mergekit_slerp", "mergekit_sce", "mergekit_nearswap",
    "mergekit_ram",
    "arcee_fusion",
}  # fmt: skip
SHAPES = [(24, 16), (16, 24), (3, 40), (540, 530)]


@pytest.fixture(scope="module")
def cut() -> Iterator[Call]:
    """As Apple's GPUs: without float64, factorings and solves."""
    with pocket.elsewhere(cut=True) as call:
        yield call


@pytest.fixture(scope="module")
def whole() -> Iterator[Call]:
    """As CUDA, with everything."""
    with pocket.elsewhere(cut=False) as call:
        yield call


def here(deltas: Tensor, name: str) -> acemerge.LayerResult:
    given = {key: value.to(deltas.dtype) for key, value in measurements(deltas, name).items()}
    return acemerge.merge_deltas(deltas, name, **given, **dict(RULES[name].params))


@spread(name=RULES, shape=SHAPES)
def test_the_host_does_what_a_device_lacks(name: str, shape: tuple[int, int], cut: Call) -> None:
    deltas = accepted(task_vectors(4, shape), name).float()
    expected = here(deltas, name)
    delta, statuses, device = cut(pocket.layer, deltas, name)
    assert device == pocket.NAME
    assert relative_error(delta, expected.delta) < 1e-6
    own = tuple(status for status in expected.stats.statuses if status != Status.OK)
    assert statuses == (expected.stats.statuses if name in WHOLLY_THERE else (*own, Status.ON_HOST))


@crossed(name=RULES, dtype=[torch.float32, torch.float64])
def test_nothing_of_a_rule_is_left_on_the_host(name: str, dtype: torch.dtype, whole: Call) -> None:
    deltas = accepted(task_vectors(4, (24, 16)), name).to(dtype)
    expected = here(deltas, name)
    delta, statuses, device = whole(pocket.layer, deltas, name)
    assert (statuses, device) == (expected.stats.statuses, pocket.NAME)
    assert relative_error(delta, expected.delta) < 1e-6


def test_a_tensor_left_on_the_host_is_found(cut: Call, whole: Call) -> None:
    for call in (cut, whole):
        with pytest.raises(AssertionError, match="same device, but mul met one of the host's"):
            call(pocket.layer_with_stray, task_vectors(2, (3, 4)).float())


@pytest.mark.parametrize("method", ["auto", "ace", "emr", "ties", "slerp"])
def test_checkpoints_merge_on_a_device_that_lacks_much(method: str, plain: PlainModel, cut: Call) -> None:
    plain.tuned = plain.tuned[: 2 if method == "slerp" else None]
    base, experts = plain.save()
    for device in ("cpu", "auto"):
        cut(pocket.files, base, experts, plain.root / device, method, device)
    torch.testing.assert_close(load_folder(plain.root / "auto"), load_folder(plain.root / "cpu"), rtol=1e-6, atol=1e-7)
    said = {device: json.loads((plain.root / device / "acemerge.json").read_text()) for device in ("cpu", "auto")}
    moved = {n for n, about in said["auto"]["tensors"].items() if "partly on the host" in about["status"]}
    by_rule = {n for n, about in said["cpu"]["tensors"].items() if about["rule"] not in {*WHOLLY_THERE, "base"}}
    assert moved == by_rule


@pytest.mark.parametrize("method", ["auto", "ace"])
def test_state_dicts_stay_on_their_device(method: str, plain: PlainModel, cut: Call) -> None:
    found = cut(pocket.in_memory, plain.base, plain.tuned, method)
    torch.testing.assert_close(found, acemerge.merge_state_dicts(plain.base, plain.tuned, method), rtol=1e-5, atol=1e-6)


def test_devices_are_named_as_torch_names_them(cut: Call) -> None:
    assert cut(pocket.devices, "auto") == cut(pocket.devices, "pocket") == "pocket:0"
    assert cut(pocket.devices, "pocket:0") == "pocket:0"
    assert cut(pocket.devices, "cpu") == "cpu"
    assert "there is 1 of that kind; use pocket:0 to pocket:0" in cut(pocket.devices, "pocket:3")
    assert "no mps device is available; use --device pocket" in cut(pocket.devices, "mps")


@pytest.mark.parametrize("name", ["meta", "cpu:1", "gpu", "cuda:-1", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device; use cpu, auto, or cuda, xpu or mps"):
        find_devices(name)
