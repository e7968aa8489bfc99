"""Writing safetensors files tensor by tensor, hashed on the way, so that a file can be continued.

A file is written as `NAME.acemerge.partial` and synced when it is complete; giving it its name is another step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from acemerge.checkpoints import files, machine, objects
from acemerge.checkpoints.address import scheme_of
from acemerge.checkpoints.header import DTYPE_NAMES, TensorSpec
from acemerge.checkpoints.weight_files import SINGLE
from acemerge.errors import WriteError
from acemerge.shapes import Tensor

PARTIAL = ".acemerge.partial"
_SEND = 32 << 20


def split_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[tuple[str, list[TensorSpec]]]:
    """Tensors to files: `model.safetensors`, or numbered shards of at most `max_bytes` each.

    A tensor larger than that gets a shard of its own. Wide types come first, so that every tensor is aligned.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in ordered:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    total = len(shards)
    return [(f"model-{i:05d}-of-{total:05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def index_bytes(shards: Sequence[tuple[str, Sequence[TensorSpec]]]) -> bytes:
    """The index of a model in several shards."""
    weight_map = {spec.name: file for file, specs in shards for spec in specs}
    total = sum(spec.nbytes for _, specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def header_bytes(specs: Iterable[TensorSpec]) -> bytes:
    """The safetensors header of tensors stored one behind the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class FileSum:
    """Hash and size of a file, or of its beginning."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Begun:
    """The first bytes of a file that a run may go on with."""

    nbytes: int
    digest: hashlib._Hash
    steps: int = 0  # that wrote them

    @property
    def sum(self) -> FileSum:
        return FileSum(self.digest.hexdigest(), self.nbytes)


class FileWriter:
    """A file under its name for the time being, from its beginning or behind what there is of it.

    Without `cached`, the disk begins to write at once and the system need not keep what it has.
    """

    def __init__(self, path: Path, begun: Begun | None = None, cached: bool = True) -> None:
        self._path = path
        self._digest = begun.digest.copy() if begun else hashlib.sha256()
        self._nbytes = begun.nbytes if begun else 0
        self._cached, self._sent = cached, self._nbytes
        if begun:
            self._descriptor = files.reopen(path, begun.nbytes)
        else:
            files.remove(path)  # what an interrupted run left of it
            self._descriptor = files.create(path)

    @property
    def sum(self) -> FileSum:
        """Of all that was written so far."""
        return FileSum(self._digest.copy().hexdigest(), self._nbytes)

    def write(self, chunk: bytes | memoryview) -> None:
        files.write_all(self._descriptor, chunk, self._path)
        self._digest.update(chunk)
        self._nbytes += len(chunk)
        if not self._cached and self._nbytes - self._sent > _SEND:
            files.forget(self._descriptor, self._sent, self._nbytes - self._sent)
            self._sent = self._nbytes

    def finish(self) -> FileSum:
        """Sync and close."""
        files.sync_and_close(self._descriptor, self._path)
        return self.sum

    def close(self) -> None:
        """Leave it as it is."""
        files.close(self._descriptor)


def write_partial(path: Path, chunks: Iterable[bytes | memoryview]) -> FileSum:
    """Write all of `NAME.partial` and sync it."""
    writer = FileWriter(path.with_name(path.name + PARTIAL))
    try:
        for chunk in chunks:
            writer.write(chunk)
    except BaseException:
        writer.close()
        raise
    return writer.finish()


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and give it its name when it is whole; its folder is made. An object in a store is
    whole when it is there.
    """
    if scheme_of(path):
        objects.put(path, data)
        return
    files.make_folder(path.parent)
    write_partial(path, [data])
    files.rename(path.with_name(path.name + PARTIAL), path)


class TensorFiles:
    """Several safetensors files, each with its tensors in the order of its specs, whole or in ranges of rows.

    `begun` says which files there are parts of already. Files are opened with their first tensor and finished,
    and read back, with their last one; `finished` holds their sums. `steps` says how often `end_of_tensor` is to be
    told of a file, once for each of its tensors unless given.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, Sequence[TensorSpec]],
        begun: Mapping[str, Begun],
        steps: Mapping[str, int] | None = None,
    ) -> None:
        self.finished: dict[str, FileSum] = {}
        self._folder, self._layout, self._begun = folder, layout, dict(begun)
        self._cached = machine.stays_cached(sum(spec.nbytes for specs in layout.values() for spec in specs))
        # Not counted in bytes: the last tensor may have none.
        self._left = dict(steps or {name: len(specs) for name, specs in layout.items()})
        for name, there in begun.items():
            self._left[name] -= there.steps
        self._open: dict[str, FileWriter] = {}
        for name in begun:
            if not self._left[name]:
                self._finish(name, self._writer(name))

    def write(self, name: str, tensor: Tensor) -> None:
        self._writer(name).write(tensor_bytes(tensor))

    def end_of_tensor(self, names: Iterable[str]) -> dict[str, FileSum]:
        """These files have one tensor more: finish those that are complete, and say how far all of them are."""
        sums = {}
        for name in names:
            writer = self._open[name]
            sums[name] = writer.sum
            self._left[name] -= 1
            if not self._left[name]:
                self._finish(name, writer)
        return sums

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the files that are not complete as they are."""
        for writer in self._open.values():
            writer.close()
        self._open.clear()

    def _writer(self, name: str) -> FileWriter:
        if name not in self._open:
            begun = self._begun.pop(name, None)
            self._open[name] = FileWriter(self._partial(name), begun, self._cached)
            if begun is None:
                self._open[name].write(header_bytes(self._layout[name]))
        return self._open[name]

    def _finish(self, name: str, writer: FileWriter) -> None:
        del self._open[name]
        self.finished[name] = writer.finish()
        _check_readable(self._partial(name), {spec.name for spec in self._layout[name]})

    def _partial(self, name: str) -> Path:
        return self._folder / (name + PARTIAL)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they are stored: row-major, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _check_readable(path: Path, names: set[str]) -> None:
    """Open a written file with the reference reader and compare its tensor names."""
    try:
        with safetensors.safe_open(path, framework="pt") as reader:
            found = set(reader.keys())
    except (OSError, ValueError, safetensors.SafetensorError) as failure:
        raise WriteError(path, f"does not read back ({failure})", "check the path and the disk, run again") from None
    if found != names:
        raise WriteError(path, "does not read back as it was written", "check the disk and run again")
