"""Which devices a name stands for, on machines that are not this one."""

from __future__ import annotations

import pytest
import torch

from acemerge.errors import UsageError
from acemerge.linalg import devices as of_devices
from acemerge.linalg.devices import find_devices, kind_of, title_of


def machine_with(patch: pytest.MonkeyPatch, kind: str | None, count: int = 1) -> None:
    found = None if kind is None else torch.device(kind)
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    patch.setattr(torch.accelerator, "device_count", lambda: count)
    patch.setattr(of_devices, "has_float64", lambda device: device.type != "mps")


@pytest.mark.parametrize(
    ("kind", "count", "name", "devices"),
    [
        (None, 0, "auto", ["cpu"]),
        (None, 0, "cpu", ["cpu"]),
        ("cuda", 2, "auto", ["cuda:0", "cuda:1"]),
        ("cuda", 2, "cuda", ["cuda:0", "cuda:1"]),
        ("cuda", 2, "cuda:1", ["cuda:1"]),
        ("cuda", 2, "cpu", ["cpu"]),
        ("xpu", 2, "xpu", ["xpu:0", "xpu:1"]),
        ("xpu", 1, "auto", ["xpu:0"]),
        ("mps", 1, "auto", ["cpu"]),
    ],
)
def test_a_name_stands_for_devices(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, name: str, devices: list[str]
) -> None:
    machine_with(monkeypatch, kind, count)
    assert [str(device) for device in find_devices(name)] == devices


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        (None, "cuda", "no CUDA device is available; use --device cpu"),
        (None, "mps", "no MPS device is available; use --device cpu"),
        ("mps", "cuda", "no CUDA device is available; use mps or cpu"),
        ("cuda", "cuda:7", "there are 1 of them, numbered from 0"),
        ("cuda", "meta", "no META device is available; use cuda or cpu"),
        ("cuda", "gpu", "unknown device"),
        ("mps", "mps", "--device mps: has no float64, which the rules fall back to; use --device cpu"),
        (None, "cuda:x", "unknown device"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str | None, name: str, what: str) -> None:
    machine_with(monkeypatch, kind)
    with pytest.raises(UsageError, match=what):
        find_devices(name)


def test_auto_is_named_by_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "xpu")
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"Max 1550, {device}")
    assert kind_of("auto") == "xpu"
    assert title_of("xpu:0") == "Max 1550, xpu:0"
    assert title_of("mps") == "mps"
