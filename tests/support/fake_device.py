"""An accelerator that is not there: its tensors lie in the host's memory, and it is as strict as a real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_COPIES = ("aten::copy_", "aten::_to_copy")  # where tensors of the device and of the host may meet


# torch knows a device of this name from here on, and leaves all that is done on it to Python.
backend_registration._setup_privateuseone_for_python_backend("pretend")


class StrayError(AssertionError):
    """A tensor of the host met one of the device, which no real device forgives."""


class FakeTensor(Tensor):
    """A tensor of the device; `held` are its values: of a view, a view of them."""

    held: Tensor
    on: FakeDevice

    @staticmethod
    def __new__(cls, held: Tensor, on: FakeDevice) -> FakeTensor:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=on.device,
        )
        self.held, self.on = held, on
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # which torch has for no tensor of a class of its own
            return args[0].held.tolist()
        if func is Tensor.new_tensor:  # what torch brings to the device by itself
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1], dtype=torch.int64).to(args[0].device)]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on = next(x.on for x in tree_iter((args, kwargs)) if isinstance(x, FakeTensor))
        return on.run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """A device without these types and operations: as torch does, it raises TypeError for the ones, NotImplementedError
    for the others. `ran` counts what it did. Tensors are made on it where it is entered.

    Each number is another device.
    """

    def __init__(self, number: int, types: Sequence[torch.dtype] = (), operations: Sequence[str] = ()) -> None:
        super().__init__()
        self.device = torch.device("pretend", number)
        self.lacks_types, self.lacks_operations = frozenset(types), frozenset(f"aten::{name}" for name in operations)
        self.ran = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = any(isinstance(x, FakeTensor) for x in tree_iter((args, kwargs)))
        return self.run(func, args, kwargs) if mine or self._is_own(kwargs.get("device")) else func(*args, **kwargs)

    def _is_own(self, asked: Any) -> bool:
        return asked is not None and torch.device(asked).type == self.device.type

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, asked = func._schema.name, kwargs.get("device")
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        mine = [x for x in given if isinstance(x, FakeTensor)]
        strays = [tuple(x.shape) for x in given if not isinstance(x, FakeTensor) and x.ndim]
        if mine and strays and name not in _COPIES:
            raise StrayError(f"{name} got tensors of the host, {strays}, beside those of {self.device}")
        target = args[0] if name == "aten::copy_" else None
        leaves = isinstance(target, Tensor) and not isinstance(target, FakeTensor)
        leaves |= asked is not None and not self._is_own(asked)
        if name in self.lacks_operations:
            raise NotImplementedError(f"The operator {name!r} is not currently implemented for {self.device}")
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, FakeTensor) else x, (args, kwargs))
        found = func(*held_args, **held_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the tensor of the device takes the new shape too
            with no_dispatch():
                func(*args, **kwargs)
            return args[0]
        if leaves:
            return target if target is not None else found
        self.ran += 1
        same = {id(x.held): x for x in mine}
        return tree_map(lambda x: self._own(x, same) if isinstance(x, Tensor) else x, found)

    def _own(self, found: Tensor, same: dict[int, FakeTensor]) -> Tensor:
        if id(found) in same:
            return same[id(found)]
        if found.dtype in self.lacks_types:
            raise TypeError(f"{self.device} has no {found.dtype}")
        return FakeTensor(found, self)
