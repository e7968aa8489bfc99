"""Measurements on disk: safetensors in a folder, a set of files and then its index for every expert."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint, open_file
from acemerge.checkpoints.header import TensorSpec, parse_json
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError
from acemerge.methods import Calibration
from acemerge.output.writer import PARTIAL, header_bytes, tensor_bytes, write_partial
from acemerge.shapes import Tensor

Kept = Calibration | Literal["text"]  # what was measured, and what experts wrote to be measured on
_PART = 1 << 30
_MAX_INDEX = 64 << 20


@dataclass
class Store:
    """What was measured of each expert, by tensor. Only where values lie is kept in memory."""

    folder: Path
    _found: dict[tuple[Kept, int], dict[str, Checkpoint]] = field(default_factory=dict)

    def of(self, wanted: Kept, tensor: str, experts: Sequence[int]) -> Tensor | None:
        """One measurement of a tensor for each of the experts, (T, ...) in float32; None if one of them lacks it."""
        places = [self._found.get((wanted, i), {}).get(tensor) for i in experts]
        there = [place for place in places if place is not None]
        return torch.stack([place.read(tensor) for place in there]) if len(there) == len(places) else None

    def has(self, wanted: Calibration | None, tensor: str, expert: int) -> bool:
        return wanted is not None and tensor in self._found.get((wanted, expert), {})

    def restore(self, key: str, wanted: Kept, expert: int) -> bool:
        """Take what an interrupted run had measured under this key, if its files are as they were written."""
        index = self.folder / f"{key}.json"
        if files.kind(index) != "file":
            return False
        try:
            sums = parse_json(files.read_small(index, _MAX_INDEX), index, "measure again")
            root = files.resolve(self.folder)
            paths = {name: contained(root, name) for name in sums} if isinstance(sums, dict) else None
            if paths is None or any(files.sha256(path) != sums[name] for name, path in paths.items()):
                return False
            self._add(wanted, expert, paths.values())
        except CheckpointError:
            return False
        return True

    def write(self, key: str, wanted: Kept, expert: int, values: Iterable[tuple[str, Tensor]]) -> None:
        """Write the values as they come, in files of about a gigabyte, and then the index that makes them count."""
        sums: dict[str, Any] = {}
        part: dict[str, Tensor] = {}
        for name, value in chain(values, [("", torch.empty(0))]):
            if part and (not name or sum(v.nbytes for v in part.values()) + value.nbytes // 2 > _PART):
                file = f"{key}-{len(sums)}.safetensors"
                sums[file] = self._write(file, part)
                part = {}
            if name:
                part[name] = value.float().cpu()
        self._finish(f"{key}.json", [json.dumps(sums).encode()])
        self._add(wanted, expert, [self.folder / file for file in sums])

    def _add(self, wanted: Kept, expert: int, paths: Iterable[Path]) -> None:
        found = self._found.setdefault((wanted, expert), {})
        for path in paths:
            checkpoint = open_file(path)
            found |= dict.fromkeys(checkpoint.tensors, checkpoint)

    def _write(self, file: str, values: Mapping[str, Tensor]) -> str:
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
        return self._finish(file, chain([header_bytes(specs)], map(tensor_bytes, values.values())))

    def _finish(self, file: str, chunks: Iterable[bytes | memoryview]) -> str:
        written = write_partial(self.folder / file, chunks)
        files.rename(self.folder / (file + PARTIAL), self.folder / file)
        files.sync_folder(self.folder)
        return written.sha256
