"""Every rule keeps to the device that its task vectors are on. No device is needed for that: see fake_device."""

from __future__ import annotations

import pytest
import torch
from conformance import RULES, accepted, measurements, result
from fake_device import FakeDevice, StrayError
from oracles import relative_error, task_vectors
from torch import Tensor

import acemerge
from acemerge.engine import one_layer
from acemerge.shapes import Float


def merged_on(device: FakeDevice, deltas: Tensor, name: str) -> Float[Tensor, "out in"]:
    given = {key: value.to(device.device) for key, value in measurements(deltas, name).items()}
    found: Tensor = acemerge.merge_deltas(deltas.to(device.device), name, **given).delta
    assert found.device == device.device
    return found.cpu()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_to_its_device(name: str) -> None:
    for shape, dtype in (((24, 16), torch.float32), ((3, 40), torch.float64)):
        deltas = accepted(task_vectors(4, shape), name).to(dtype)
        with FakeDevice(0) as device:
            there = merged_on(device, deltas, name)
        assert device.ran > 5
        assert relative_error(there, result(deltas, name).delta) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_a_tensor_left_on_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' weights, not brought to the device: on a CPU nothing tells."""
    name, made = "task_arithmetic", one_layer._layer
    monkeypatch.setattr(one_layer, "_layer", lambda *given: made(*given[:-1], torch.device("cpu")))
    deltas = task_vectors(4, (24, 16))
    assert torch.isfinite(result(deltas, name).delta).all()
    with FakeDevice(0) as device, pytest.raises(StrayError, match="of the host"):
        merged_on(device, deltas, name)
