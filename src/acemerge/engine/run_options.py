"""What decides how a recipe is run, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from acemerge.errors import UsageError, shown
from acemerge.planning.parts import Part, parse_part

# HOST:PORT
_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}", re.ASCII)


def _device_name(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


def _cluster(value: str | None) -> str | None:
    """What Ray's driver may be told: its client, `ray://`, would run here without the cluster's file system."""
    if value is not None and value not in ("auto", "local") and not _ADDRESS.fullmatch(value):
        raise ValueError("is no cluster")
    return value


Bytes = Annotated[ByteSize, Field(ge=1, lt=1 << 62)]


@pydantic_dataclass(frozen=True, config=ConfigDict(validate_default=True))
class RunOptions:
    """What decides how a recipe is run, but not the values that come out. Sizes are numbers of bytes, or as `5GB`."""

    device: Annotated[str, BeforeValidator(_device_name)] = "cpu"
    max_shard_size: Bytes = ByteSize(5 * 10**9)
    workers: Annotated[int, Field(ge=1)] = 1
    overwrite: bool = False
    resume: bool = False
    max_memory: Bytes | None = None
    allow_pickle: bool = False
    dequantize: bool = False
    force: bool = False
    quiet: bool = False
    push: str | None = None
    report: bool = False
    shard: Annotated[Part | None, BeforeValidator(parse_part)] = None
    finish: bool = False
    ray: Annotated[str | None, AfterValidator(_cluster)] = None
    stream: bool = False
    hash_files: bool = False

    @property
    def asked_for_parts(self) -> str | None:
        """The option that has the merge done in parts, and its value; None where none has."""
        if self.shard is not None:
            return f"--shard {self.shard}"
        return "--finish" if self.finish else f"--ray {self.ray}" if self.ray is not None else None


_WRONG = {
    "workers": ("is not a number of workers", "use 1 or more"),
    "max_shard_size": ("is not a size in bytes", "write for example 5GB or 512MiB"),
    "shard": ("is no part of a merge", "write K/N with K from 1 to N, as 2/3"),
    "ray": ("is no Ray cluster", "write HOST:PORT of its head, on a machine of the cluster; or auto, or local"),
    "max_memory": ("is not a size in bytes", "write for example 8GB or 512MiB"),
}


def make_options(given: Mapping[str, Any]) -> RunOptions:
    """Checked options of a run; UsageError names the first wrong one and the cure."""
    try:
        return RunOptions(**given)
    except ValidationError as failure:
        first = failure.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"][0].lower() + first["msg"][1:]
        what, cure = _WRONG.get(name, (f"is wrong: {message}", "see `acemerge merge --help`"))
        raise UsageError(f"--{name.replace('_', '-')}", f"{shown(first['input'])} {what}", cure) from None


def check_together(options: RunOptions) -> None:
    """UsageError where a part is asked for something that only all parts together have."""
    if options.ray is not None and (options.shard is not None or options.finish):
        what = f"does not go with --{'finish' if options.finish else 'shard'}"
        raise UsageError(f"--ray {options.ray}", what, "give it alone: it computes all parts and puts them together")
    if options.ray is not None and options.device not in ("cpu", "cuda", "auto"):
        what = "cannot be chosen where Ray gives each task a device of its own"
        raise UsageError(f"--device {options.device}", what, "use cpu, cuda or auto")
    beside = {"finish": options.finish, "push": options.push is not None, "report": options.report}
    for name in (name for name, given in beside.items() if given and options.shard is not None):
        cure = "give it by itself" if name == "finish" else "give it with --finish"
        raise UsageError(f"--shard {options.shard}", f"a part has no use for --{name}", cure)
