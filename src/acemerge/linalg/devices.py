"""Where tensors are computed: the CPU, or the kind of accelerator that torch was built for and finds."""

from __future__ import annotations

import torch

from acemerge.errors import UsageError

_OWN_STREAMS = ("cuda", "xpu")  # whose threads can each have a queue of work of their own
_CURE = "use cpu, auto, or an accelerator of this machine: cuda, xpu, or one by its number as cuda:1"


def kind_of(name: str) -> str:
    """What `auto` stands for: an accelerator that will do, else the CPU. Other names stand for themselves."""
    if name != "auto":
        return name
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None or not has_float64(found) else found.type


def find_devices(name: str) -> tuple[torch.device, ...]:
    """`cpu`, one accelerator by its number, or all of them: `cuda`, `xpu`, and `auto` where there are any."""
    try:
        asked = torch.device(kind_of(name))
    except RuntimeError:
        raise UsageError(f"--device {name}", "unknown device", _CURE) from None
    if asked.type == "cpu":
        return (asked,)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != asked.type:
        what = f"no {asked.type.upper()} device is available"
        raise UsageError(f"--device {name}", what, "use --device cpu" if found is None else f"use {found.type} or cpu")
    if not has_float64(torch.device(asked.type)):
        raise UsageError(f"--device {name}", "has no float64, which the rules fall back to", "use --device cpu")
    count = torch.accelerator.device_count()
    if asked.index is None:
        return tuple(torch.device(asked.type, i) for i in range(count))
    if asked.index >= count:
        raise UsageError(f"--device {name}", f"there are {count} of them, numbered from 0", "choose one of these")
    return (asked,)


def has_float64(device: torch.device) -> bool:
    """Whether a device adds float64: MPS has none, and some of Intel's GPUs do not either."""
    try:
        return float(torch.ones(2, dtype=torch.float64, device=device).sum()) == 2
    except (TypeError, RuntimeError):
        return False


def title_of(name: str) -> str:
    """What an accelerator calls itself; of one that does not say, its kind."""
    device = torch.device(name)
    if device.type not in _OWN_STREAMS:
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def synchronise(device: torch.device) -> None:
    """Wait for what a device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def work_on(device: torch.device) -> None:
    """Have the calling thread work on an accelerator, in a queue of its own where there can be several."""
    torch.accelerator.set_device_index(device)
    if device.type in _OWN_STREAMS:
        torch.accelerator.set_stream(torch.Stream(device))
