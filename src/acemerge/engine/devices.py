"""The devices that `--device` names."""

from __future__ import annotations

import torch

from acemerge.errors import UsageError
from acemerge.linalg.device import accelerator

_CURE = "use cpu, auto, or cuda, xpu or mps, with :N for one of several"


def find_devices(name: str) -> tuple[torch.device, ...]:
    """`cpu`, one accelerator by its number, or all of them: by their kind, and `auto` where there are any."""
    there = accelerator()
    if name == "auto":
        name = there or "cpu"
    if name == "cpu":
        return (torch.device(name),)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type in ("cpu", "meta"):
        raise UsageError(f"--device {name}", "unknown device", _CURE)
    if device.type != there:
        raise UsageError(f"--device {name}", f"no {device.type} device is available", f"use --device {there or 'cpu'}")
    count = torch.accelerator.device_count()
    if device.index is None:
        return tuple(torch.device(device.type, i) for i in range(count))
    if device.index >= count:
        what = f"there {'is' if count == 1 else 'are'} {count} of that kind"
        raise UsageError(f"--device {name}", what, f"use {device.type}:0 to {device.type}:{count - 1}")
    return (device,)
