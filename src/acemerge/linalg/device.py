"""What a device lacks is done on the host: numbers of a type that it does not have, operations that nobody wrote for
it.

Rules and numerics are written for a device that has everything, as a CPU and CUDA have. Of others, each operation of
torch is looked at before it runs. One that is missing there, or has to do with a missing type, runs on the host, and
what comes of it goes back. Numbers of a missing type stay on the host: there is no other place for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from acemerge.shapes import Tensor

_COMPLETE = ("cpu", "cuda", "meta")
_TYPES = (torch.float64, torch.bfloat16)  # that rules compute in, and some devices do not
_STREAMS = ("cuda", "xpu")  # where a thread may have one of its own
_HOST = torch.device("cpu")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
_NO_FACTORING = ("linalg_vector_norm", "linalg_cross")

Item = TypeVar("Item")
Operation = Any  # a torch.ops.aten.NAME.OVERLOAD, whose class is private


@lru_cache(maxsize=16)
def missing_types(device: torch.device) -> frozenset[torch.dtype]:
    """The types that a device cannot compute in, found by trying."""
    return frozenset() if device.type in _COMPLETE else frozenset(t for t in _TYPES if not _computes(device, t))


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        return int((torch.ones(1, dtype=dtype, device=device) + 1).cpu().item()) == 2
    except (TypeError, RuntimeError):
        return False


@dataclass(frozen=True)
class Host:
    """What the host did in a block."""

    mode: _WithHost | None
    before: int = 0

    @property
    def helped(self) -> bool:
        """Whether products, factorings or solves ran on the host so far, for the device could not do them."""
        return self.mode is not None and self.mode.steps > self.before


@contextlib.contextmanager
def with_host(device: torch.device) -> Iterator[Host]:
    """In this block, and this thread, the host does what `device` cannot. Blocks may lie in one another."""
    around = _active.innermost
    if device.type in _COMPLETE:
        yield Host(None)
    elif around is not None and around.device == device:
        yield Host(around, around.steps)
    else:
        mode = _WithHost(device, missing_types(device))
        _active.innermost = mode
        try:
            with mode:
                yield Host(mode)
        finally:
            _active.innermost = around


def each_with_host(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """The items, each made with the host's help; what is done with them is not."""
    end = object()
    while True:
        with with_host(device):
            item = next(items, end)
        if item is end:
            return
        yield cast(Item, item)


def begin_thread(device: torch.device) -> None:
    """Have what this thread computes go to `device`, beside what others do there where it has several streams."""
    torch.accelerator.set_device_index(device)
    if device.type in _STREAMS:
        torch.accelerator.set_stream(torch.Stream(device))


def accelerator() -> str | None:
    """The kind of accelerator that torch finds: cuda, xpu, mps."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def device_name(device: torch.device) -> str:
    """Which product a device is, as far as its driver says."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else device.type


class _Active(threading.local):
    innermost: _WithHost | None = None


_active = _Active()
_missing: dict[str, set[Operation]] = {}  # by the kind of a device: what it said that it has not


class _WithHost(TorchDispatchMode):
    """Sees every operation below autograd, in the form in which kernels are written for it."""

    def __init__(self, device: torch.device, types: frozenset[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.steps = device, 0
        self._types, self._missing = types, _missing.setdefault(device.type, set())

    def __torch_dispatch__(
        self, func: Operation, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # lies where the whole lies
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in self._missing and any(map(self._is_there, given)):
            return self._on_host(func, given, args, kwargs)
        if kwargs.get("dtype") in self._types or any(x.dtype in self._types for x in given):
            return self._of_missing_type(func, given, args, kwargs)
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if not any(map(self._is_there, given)):
                raise
        self._missing.add(func)
        return self._on_host(func, given, args, kwargs)

    def _is_there(self, x: Tensor) -> bool:
        return x.device.type == self.device.type

    def _of_missing_type(
        self, func: Operation, given: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is torch.ops.aten.copy_.default and self._is_there(args[0]):
            return args[0].copy_(args[1].to(args[0].dtype))
        wide = [x for x in given if x.dtype in self._types]
        beside = any(self._is_there(x) and x.ndim and x.dtype.is_floating_point for x in given)
        if kwargs.get("dtype") not in self._types and beside and not any(x.ndim for x in wide):
            # A number beside a tensor does not decide the type of the result: it is taken in the tensor's.
            args, kwargs = tree_map(lambda x: x.float() if any(x is one for one in wide) else x, (args, kwargs))
            return self.__torch_dispatch__(func, (), args, kwargs)
        return self._on_host(func, given, args, kwargs)

    def _on_host(self, func: Operation, given: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.steps += _is_work(func)
        copies = {id(x): x.to(_HOST) for x in given if self._is_there(x)}
        originals = {id(copies.get(id(x), x)): x for x in given}
        asked = kwargs.get("device")
        stays = asked is not None and torch.device(asked).type != self.device.type
        if asked is not None and not stays:
            kwargs = {**kwargs, "device": _HOST}
        args, kwargs = tree_map(lambda x: copies.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs))
        found = func(*args, **kwargs)
        for x in _written(func, args, kwargs):
            if originals[id(x)] is not x:
                originals[id(x)].copy_(x)

        def back(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in originals:  # worked on in place
                return originals[id(x)]
            return x if stays or x.dtype in self._types else x.to(self.device)

        return tree_map(back, found)


def _is_work(func: Operation) -> bool:
    name: str = func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS or name.startswith(("cholesky", "geqrf", "ormqr")):
        return True
    return name.removeprefix("_").startswith("linalg") and name not in _NO_FACTORING


def _written(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """What an operation writes into: itself where it works in place, and what is named `out`."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))
