"""A device that no machine has: `pocket`, an accelerator to torch, whose tensors lie in the host's memory.

It is as strict as others are: its tensors and the host's do not meet in an operation, single numbers apart. It is
`cut` down, as Apple's GPUs are, and has no float64 and no factoring or solve; or it has everything, as CUDA. Torch
never forgets a device: it is for a process of its own, where `elsewhere` calls functions.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conformance import RULES, measurements
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import acemerge
from acemerge.engine.devices import find_devices
from acemerge.errors import UsageError
from acemerge.linalg.device import with_host
from acemerge.methods import Status

NAME = "pocket"
NOT_WRITTEN = ("linalg_", "_linalg_", "cholesky", "triangular_solve", "geqrf", "ormqr", "lu_")
WRITTEN = ("linalg_vector_norm",)
MIXING = ("copy_", "_to_copy", "_copy_from", "index", "index_put_")  # the indices may be the host's

_kept: list[object] = []  # a library ends with its object
_cut = False


class Pocket(Tensor):
    """A tensor of the device; `held` is the host's tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pocket:
        if _cut and held.dtype == torch.float64:
            raise TypeError("Cannot convert a pocket Tensor to float64: the device has no such type")
        place = {"dtype": held.dtype, "device": torch.device(NAME, 0)}
        made: Pocket = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dispatch_sizes_strides_policy="sizes", **place
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(func, *args, **(kwargs or {}))

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Pocket({self.held})"


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if _cut and name.startswith(NOT_WRITTEN) and name not in WRITTEN:
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the {NAME} device")
    strays = [x for x in given if not isinstance(x, Pocket) and x.ndim]
    if strays and len(strays) < len(given) and name not in MIXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} met one of the host's")
    here = torch.device(kwargs.get("device") or (NAME if any(isinstance(x, Pocket) for x in given) else "cpu"))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    wrappers = {id(x.held): x for x in given if isinstance(x, Pocket)}
    plain_args, plain_kwargs = tree_map(lambda x: x.held if isinstance(x, Pocket) else x, (args, kwargs))
    plain_kwargs.pop("pin_memory", None)
    found = func(*plain_args, **plain_kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or here.type != NAME or any(x is one for one in given):
            return x
        return wrappers.get(id(x)) if id(x) in wrappers else Pocket(x)

    return tree_map(wrapped, found)


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device: object = None) -> None: ...


def register(cut: bool) -> None:
    global _cut
    _cut = cut
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    _kept.append(library)


@contextmanager
def elsewhere(cut: bool) -> Iterator[Callable[..., Any]]:
    """`call(function, *args)` in a process that has the device."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=register, initargs=(cut,)) as pool:
        yield lambda function, *args: pool.submit(_told, function, *args).result()


def _told(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as failure:  # a typed error does not come through whole
        raise AssertionError(f"{type(failure).__name__}: {failure}\n{traceback.format_exc()}") from None


# --- what is called there ----------------------------------------------------------------------------------


def layer(deltas: Tensor, name: str) -> tuple[Tensor, tuple[Status, ...], str]:
    """What a rule makes of task vectors that are on the device, how, and where it leaves it."""
    given = {key: value.to(deltas.dtype) for key, value in measurements(deltas, name).items()}
    found = acemerge.merge_deltas(deltas.to(NAME), name, **given, **dict(RULES[name].params))
    return found.delta.cpu(), found.stats.statuses, found.delta.device.type


def layer_with_stray(deltas: Tensor) -> Tensor:
    """A sum whose weights were left on the host."""
    with with_host(torch.device(NAME, 0)):
        total: Tensor = (deltas.to(NAME) * torch.ones(len(deltas), 1, 1)).sum(0)
        return total.cpu()


def in_memory(base: dict[str, Tensor], experts: list[dict[str, Tensor]], method: str) -> dict[str, Tensor]:
    there = [{name: value.to(NAME) for name, value in model.items()} for model in (base, *experts)]
    merged = acemerge.merge_state_dicts(there[0], there[1:], method)
    assert {value.device.type for value in merged.values()} == {NAME}
    return {name: value.cpu() for name, value in merged.items()}


def files(base: Path, experts: Sequence[Path], out: Path, method: str, device: str) -> None:
    acemerge.merge(base, experts, method=method, out=out, device=device)


def devices(name: str) -> str:
    try:
        return " ".join(map(str, find_devices(name)))
    except UsageError as failure:
        return str(failure)
