"""Where a checkpoint's tensors are in a network, and watching what goes into its linear layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from acemerge.checkpoints.header import TensorSpec
from acemerge.models.fused_experts import expert_number
from acemerge.models.renaming import checkpoint_renaming
from acemerge.shapes import Tensor

_PARTS = ("", "vision_model.")  # half of a model may be run within the whole, or the other way round
_PRODUCTS = {
    *(nn.functional.linear, torch.matmul, torch.mm, torch.bmm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm),
}


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter's name, and its slice where a checkpoint holds fused experts apart."""

    parameter: str
    slice: int | None = None


# A layer that is seen: its weight's name in the network, and the slice of a stack of weights, 0 of one by itself.
TappedLayer = tuple[str, int]
See = Callable[[TappedLayer, Tensor], None]  # told of every input (..., in) of a layer


def parameter_slices(network: nn.Module, tensors: Mapping[str, TensorSpec]) -> dict[str, ParameterSlice]:
    """The place of every tensor that the network has, by its name in a checkpoint of the architecture."""
    rename, state = checkpoint_renaming(network), network.state_dict()
    found = {}
    for name in tensors:
        renamed, converted = rename(name)
        spellings = [p + renamed for p in _PARTS] + [renamed.removeprefix(p) for p in _PARTS]
        parameter = next((spelling for spelling in spellings if spelling in state), None)
        number = expert_number(name)
        if parameter is not None and not converted and state[parameter].shape == tensors[name].shape:
            found[name] = ParameterSlice(parameter)
        elif parameter is not None and converted and number is not None and state[parameter].ndim == 3:
            found[name] = ParameterSlice(parameter, number)
    return found


def input_entries(network: nn.Module, place: ParameterSlice) -> int:
    """Entries of the second moments of the inputs that a place's weight would be seen with; 0 if it is not watched."""
    path, _, name = place.parameter.rpartition(".")
    module = network.get_submodule(path)
    shape = dict(module.named_parameters(recurse=False)).get(name, torch.empty(0)).shape
    if _is_linear(module) and name == "weight":
        return int(shape[1] if isinstance(module, nn.Linear) else shape[0]) ** 2
    return shape[0] * max(shape[1:]) ** 2 if len(shape) == 3 else 0


@contextlib.contextmanager
def watching(network: nn.Module, parameters: set[str], see: See) -> Iterator[None]:
    """While the block lasts, `see` is told of the inputs of the layers with these weights.

    Linear and Conv1D layers by hooks; of fused experts the products with their stacked weights. Weights that are used
    in another way are not seen.
    """
    with contextlib.ExitStack() as stack:
        for path, module in network.named_modules():
            own = {name: f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            wanted = {name: full for name, full in own.items() if full in parameters}
            if not wanted:
                continue
            if _is_linear(module):
                hook = module.register_forward_pre_hook(_hook(wanted.get("weight"), see), with_kwargs=True)
                stack.callback(hook.remove)
            elif stacks := {full: p for name, full in wanted.items() if (p := getattr(module, name)).ndim == 3}:
                stack.enter_context(_watched(module, _Products(stacks, see)))
        yield


@contextlib.contextmanager
def watching_gradients(network: nn.Module, parameters: set[str], see: See) -> Iterator[None]:
    """While the block lasts, `see` is told, in a backward pass, of the gradients at the outputs of the linear and
    Conv1D layers with these weights. No parameter needs a gradient.
    """
    with contextlib.ExitStack() as stack:
        for path, module in network.named_modules():
            weight = f"{path}.weight".lstrip(".")
            if weight in parameters and _is_linear(module):
                stack.callback(module.register_forward_hook(_gradient_hook(weight, see)).remove)
        yield


def _gradient_hook(weight: str, see: See) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        with torch.enable_grad():
            # A sum, so that what follows may change it in place.
            output = output + output.new_zeros(1, requires_grad=True)
        output.register_hook(lambda gradient: see((weight, 0), gradient))
        return output

    return hook


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _hook(weight: str | None, see: See) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if weight is not None:
            see((weight, 0), args[0] if args else next(iter(kwargs.values())))

    return hook


@contextlib.contextmanager
def _watched(module: nn.Module, products: _Products) -> Iterator[None]:
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with products:
            return forward(*args, **kwargs)

    module.forward = watched
    try:
        yield
    finally:
        module.forward = forward


class _Products(TorchFunctionMode):
    """Tells of the left factors of products with stacked weights, or with one of a stack."""

    def __init__(self, stacks: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self._stacks = {p.untyped_storage().data_ptr(): (name, p) for name, p in stacks.items()}
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, weight: Tensor) -> None:
        name, stack = self._stacks.get(weight.untyped_storage().data_ptr(), (None, None))
        if name is None or stack is None:
            return
        if weight.ndim == 2:
            self._see((name, (weight.storage_offset() - stack.storage_offset()) // stack.stride(0)), x)
        elif x.ndim == 3:
            for i, part in enumerate(x):
                self._see((name, i), part)
