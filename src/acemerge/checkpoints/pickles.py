"""A state dict saved by `torch.save`, read as data: the same list of tensors that a safetensors header gives.

`torch.load`, even with `weights_only=True`, calls what the pickle names, from a list of its own; releases before
2.6 could be made to run code, and a few bytes can still make any release allocate, or hash, without end. Here
nothing is called: the opcodes that describe a state dict are followed with plain values, all others are refused,
and the tensors' bytes are read later, by their offsets, as those of safetensors are.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.archive import DAMAGED, Record, read_at, read_records
from acemerge.checkpoints.header import MAX_TENSORS, TensorInfo, TensorSpec, check_name
from acemerge.errors import CheckpointError

MAX_PICKLE = 16 << 20
MAX_OPCODES = 1_000_000  # about thirty for a tensor
_CURE = "load it where you trust it and save its state dict again with save_pretrained, which writes safetensors"

_STORAGES: dict[str, torch.dtype] = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
# The order in which the safetensors writer stores types, last first: a pickled model then merges to the same bytes.
_STORED_ORDER = ("bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64")


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for. It is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # in entries of the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _NoStateDictError(Exception):
    """What in the pickle cannot be followed."""


def read_pickle(path: Path) -> list[TensorInfo]:
    """All tensors of one file of `torch.save`; CheckpointError where it is anything but a plain state dict."""
    descriptor = files.open_for_reading(path)
    try:
        records = read_records(descriptor, path)
        program = _content(descriptor, records, "data.pkl", path)
        if "byteorder" in records and _content(descriptor, records, "byteorder", path) != b"little":
            raise CheckpointError(path, "was not saved on a little-endian machine", _CURE)
    finally:
        files.close(descriptor)
    try:
        content = _Machine().run(program)
    except _NoStateDictError as failure:
        raise CheckpointError(path, str(failure), _CURE) from None
    except Exception as failure:  # a broken pickle fails in many ways: an empty stack, bad text, an unknown opcode
        what = f"its pickle is malformed ({type(failure).__name__}: {str(failure)[:80]})"
        raise CheckpointError(path, what, DAMAGED) from None
    infos = [_located(name, value, records, path) for name, value in _state_dict(content, path).items()]
    infos.sort(key=lambda info: (-_STORED_ORDER.index(str(info.spec.dtype)[6:]), info.spec.name))
    return infos


def _content(descriptor: files.Handle, records: Mapping[str, Record], name: str, path: Path) -> bytes:
    record = records.get(name)
    if record is None:
        raise CheckpointError(path, f"has no record {name}", DAMAGED)
    if record.nbytes > MAX_PICKLE:
        what = f"its {name} of {record.nbytes:,} bytes is over the limit of {MAX_PICKLE:,}"
        raise CheckpointError(path, what, _CURE)
    return read_at(descriptor, record.offset, record.nbytes, path)


class _Machine:
    """Follows the opcodes of a pickled state dict. Names stay names, and no object of the pickle is made."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if count > MAX_OPCODES:
                raise _NoStateDictError(f"its pickle has more than {MAX_OPCODES:,} instructions")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise _NoStateDictError("its pickle has no end")

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE":
                self.stack = self.below.pop()
                self.stack.append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_popped(stack, int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                items = self.items(opcode == "APPENDS", 1)
                _typed(self.stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                _fill(self.items(opcode == "SETITEMS", 2), self.stack[-1])
            case "GLOBAL":
                stack.append(_named(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_built(function, arguments))
            case "BUILD":  # the `_metadata` of an OrderedDict: versions of modules, no tensors
                stack.pop()
                _typed(stack[-1], dict)
            case "PROTO":
                pass
            case _:
                raise _NoStateDictError(f"its pickle has the instruction {opcode}, which no state dict needs")

    def items(self, to_mark: bool, count: int) -> list[Any]:
        """What is on the stack since the last mark, or its last `count`."""
        if not to_mark:
            return _popped(self.stack, count)
        items, self.stack = self.stack, self.below.pop()
        return items


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("the stack is empty")
    items = stack[-count:]
    del stack[-count:]
    return items


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _NoStateDictError(f"its pickle changes a {type(value).__name__} as if it were a {kind.__name__}")
    return value


def _fill(items: list[Any], target: Any) -> None:
    table = _typed(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):  # the hash of tuples within tuples can take for ever
            raise _NoStateDictError(f"has a key that is a {type(key).__name__}, not a name")
        if key in table:
            raise _NoStateDictError(f"the key {str(key)[:80]!r} stands twice")
        table[key] = value


def _named(name: str) -> _Global:
    if name in _STORAGES or name in (_DICT, _TENSOR, _PARAMETER):
        return _Global(name)
    shown = name.replace(" ", ".")[:80]
    if name.startswith("torch ") and name.endswith("Storage"):
        raise _NoStateDictError(f"holds values of the type {shown}, which cannot be merged")
    raise _NoStateDictError(f"its pickle names {shown!r}, which no state dict needs")


def _storage(pid: Any) -> _Storage:
    kind, type_name, key, _, count = pid
    if kind != "storage" or not isinstance(type_name, _Global) or type_name.name not in _STORAGES:
        raise _NoStateDictError("its pickle asks for something that is no storage")
    if type(key) is not str or not _are_sizes((count,)):
        raise _NoStateDictError("its pickle describes a malformed storage")
    return _Storage(_STORAGES[type_name.name], key, count)


def _built(function: Any, arguments: Any) -> Any:
    """What the three calls of a state dict would give, without calling anything."""
    name = function.name if isinstance(function, _Global) else ""
    if name == _DICT and arguments == ():
        return {}
    if name == _PARAMETER and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name != _TENSOR:
        raise _NoStateDictError("its pickle makes a call that no state dict needs")
    storage, offset, shape, stride, _, _, *metadata = arguments
    sizes = all(map(_are_sizes, ((offset,), shape, stride)))
    if not isinstance(storage, _Storage) or not sizes or len(shape) != len(stride):
        raise _NoStateDictError("its pickle describes a malformed tensor")
    if any(metadata):
        raise _NoStateDictError("holds a tensor that is a conjugated or negated view")
    return _Tensor(storage, offset, shape, stride)


def _are_sizes(values: Any) -> bool:
    whole = type(values) is tuple and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    return whole and len(values) <= 16


def _state_dict(content: Any, path: Path) -> dict[str, _Tensor]:
    """The table of tensors, which may be under the one key `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        beside = next((str(key)[:80] for key in content if key != "state_dict"), None)
        if beside is not None:
            raise CheckpointError(path, f"has the entry {beside!r} beside its state_dict", _CURE)
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        what = "holds an empty table" if content == {} else f"holds a {type(content).__name__.strip('_')}"
        raise CheckpointError(path, f"{what}, not a table of tensors", _CURE)
    if len(content) > MAX_TENSORS:
        what = f"{len(content):,} tensors, more than the {MAX_TENSORS:,} that a shard may hold"
        raise CheckpointError(path, what, "save it in more shards")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            what = f"the entry {str(name)[:80]!r} is a {type(value).__name__.strip('_')} and no tensor under a name"
            raise CheckpointError(path, what, _CURE)
    return content


def _located(name: str, tensor: _Tensor, records: Mapping[str, Record], path: Path) -> TensorInfo:
    """Where the bytes of a tensor lie in the file."""
    check_name(name, path)
    storage, spec = tensor.storage, TensorSpec(name, tensor.storage.dtype, tensor.shape)
    record = records.get(f"data/{storage.key}")
    if record is None or record.nbytes != storage.count * storage.dtype.itemsize:
        raise CheckpointError(path, f"the values of tensor {name!r} are not in the file as it says", DAMAGED)
    if not _is_contiguous(tensor):
        cure = "save it again with .contiguous() on every tensor, or with save_pretrained"
        raise CheckpointError(path, f"tensor {name!r} is not stored row by row", cure)
    if tensor.offset + spec.count > storage.count:
        raise CheckpointError(path, f"tensor {name!r} reaches beyond its storage", DAMAGED)
    return TensorInfo(spec, path, record.offset + tensor.offset * storage.dtype.itemsize)


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return math.prod(tensor.shape) == 0
        expected *= size
    return True
