"""Writing an output folder so that nothing unfinished ever looks finished.

Every file is written as `NAME.partial` and synced. Only when all are there are they renamed into place, the
manifest last: readers take a folder without a manifest for unfinished. A failure before that point leaves an
earlier output as it was; a failure while renaming puts it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import INDEX, SINGLE, is_model_file
from acemerge.checkpoints.header import DTYPE_NAMES, TensorSpec, parse_json
from acemerge.errors import AcemergeError, UsageError, WriteError
from acemerge.shapes import Tensor

MANIFEST = "acemerge.json"
CARD = "README.md"
HEADS = "heads"
MASKS = "masks"
SIDE_FOLDERS = (HEADS, MASKS)
MAX_MANIFEST = 512 << 20
_LOCK = ".acemerge.lock"
_PARTIAL = ".partial"
_OLD = ".old"


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
    """Hash and size of a file."""

    sha256: str
    nbytes: int


@dataclass
class OutputFolder:
    """The files of one run, until `publish` makes them visible at once."""

    path: Path
    written: dict[str, FileSum] = field(default_factory=dict)

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        with self.stream(name) as write:
            for chunk in chunks:
                write(chunk)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """Write `NAME.partial` piece by piece; synced, and its hash and size recorded, when the block ends."""
        target = self.path / (name + _PARTIAL)
        digest, size = hashlib.sha256(), 0
        descriptor = files.create(target)

        def write(chunk: bytes | memoryview) -> None:
            nonlocal size
            files.write_all(descriptor, chunk, target)
            digest.update(chunk)
            size += len(chunk)

        try:
            yield write
        except BaseException:
            files.close(descriptor)
            raise
        files.sync_and_close(descriptor, target)
        self.written[name] = FileSum(digest.hexdigest(), size)

    @contextlib.contextmanager
    def tensor_stream(self, name: str, specs: list[TensorSpec]) -> Iterator[Callable[[Tensor], None]]:
        """Write a safetensors file tensor by tensor, in the order of `specs`, and read it back when it is done."""
        waiting = iter(specs)
        with self.stream(name) as write:
            write(header_bytes(specs))

            def write_tensor(tensor: Tensor) -> None:
                spec = next(waiting)
                if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    raise AssertionError(f"{spec.name}: made {tensor.dtype} {tuple(tensor.shape)}, planned {spec}")
                write(tensor_bytes(tensor))

            yield write_tensor
        _check_readable(self.path / (name + _PARTIAL), {spec.name for spec in specs})

    def write_tensors(self, name: str, specs: list[TensorSpec], read: Callable[[str], Tensor]) -> None:
        """Write a safetensors file, asking `read` for one tensor after the other."""
        with self.tensor_stream(name, specs) as write:
            for spec in specs:
                write(read(spec.name))

    def write_index(self, shards: list[tuple[str, list[TensorSpec]]]) -> None:
        if len(shards) == 1:
            return
        weight_map = {spec.name: file for file, specs in shards for spec in specs}
        total = sum(spec.nbytes for _, specs in shards for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_bytes(INDEX, json.dumps(index, indent=2).encode() + b"\n")

    def publish(self, manifest: bytes) -> None:
        """Rename everything into place, the manifest last; on failure put an earlier output back."""
        outputs = list(self.written)
        self.write_bytes(MANIFEST, manifest)
        replaced: list[str] = []
        placed: list[str] = []
        try:
            for name in self._obsolete():
                files.rename(self.path / name, self.path / (name + _OLD))
                replaced.append(name)
            for name in outputs:
                files.rename(self.path / (name + _PARTIAL), self.path / name)
                placed.append(name)
            self._sync()
            files.rename(self.path / (MANIFEST + _PARTIAL), self.path / MANIFEST)
            placed.append(MANIFEST)
            self._sync()
        except BaseException:
            self._roll_back(replaced, placed)
            raise
        with contextlib.suppress(AcemergeError):  # the new output is there: what is left of the old does no harm
            for name in replaced:
                files.remove(self.path / (name + _OLD))
            for folder in SIDE_FOLDERS:
                files.remove_folder(self.path / folder)

    def _sync(self) -> None:
        for folder in SIDE_FOLDERS:
            if (self.path / folder).is_dir():
                files.sync_folder(self.path / folder)
        files.sync_folder(self.path)

    def _obsolete(self) -> list[str]:
        """The files of an earlier output that must go or be replaced, its manifest first."""
        there = [name for name in self._listing() if _is_output(name) or name in self.written]
        return sorted(there, key=lambda name: name != MANIFEST)

    def _listing(self) -> list[str]:
        """Every file here and in the side folders, by its name in the manifest."""
        names = files.list_folder(self.path)
        for folder in SIDE_FOLDERS:
            if folder in names:
                names += [f"{folder}/{name}" for name in files.list_folder(self.path / folder)]
        return [name for name in names if not (self.path / name).is_dir()]

    def _roll_back(self, replaced: list[str], placed: list[str]) -> None:
        """Undo as much as can be undone; what cannot is put back by the next run's `recover`."""
        for name in reversed(placed):
            with contextlib.suppress(AcemergeError):
                files.remove(self.path / name)
        for name in reversed(replaced):
            with contextlib.suppress(AcemergeError):
                files.rename(self.path / (name + _OLD), self.path / name)

    def recover(self) -> None:
        """Tidy up after a run that was killed: before its manifest was in place, the earlier output comes back."""
        listing = self._listing()
        old = [name.removesuffix(_OLD) for name in listing if name.endswith(_OLD)]
        old = [name for name in old if _is_output(name)]
        if MANIFEST not in listing and MANIFEST in old:
            earlier = self._outputs_of(MANIFEST + _OLD)
            for name in listing:
                if _is_output(name) and name not in earlier:  # placed by the killed run
                    files.remove(self.path / name)
            for name in sorted(old, key=lambda name: name == MANIFEST):
                files.rename(self.path / (name + _OLD), self.path / name)
        for name in old:
            files.remove(self.path / (name + _OLD))

    def _outputs_of(self, manifest: str) -> set[str]:
        """The files that a manifest lists."""
        path = self.path / manifest
        content = parse_json(files.read_small(path, MAX_MANIFEST), path)
        outputs = content.get("outputs") if isinstance(content, dict) else None
        return set(outputs) if isinstance(outputs, dict) else set()

    def discard(self) -> None:
        """Remove what was written and not published."""
        for name in self._listing():
            if name.endswith(_PARTIAL) and _is_output(name.removesuffix(_PARTIAL)):
                files.remove(self.path / name)
        for folder in SIDE_FOLDERS:
            files.remove_folder(self.path / folder)


def _is_output(name: str) -> bool:
    """Whether acemerge writes files of this name."""
    if name.startswith(tuple(f"{folder}/" for folder in SIDE_FOLDERS)):
        return name.endswith(".safetensors")
    return name in (MANIFEST, CARD) or is_model_file(name)


@contextlib.contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[OutputFolder]:
    """Hold `path` for one run. What is not published when the block ends is removed.

    Raises UsageError for a link or a folder that is not empty (unless `overwrite`), WriteError where the
    folder cannot be made or another run holds it.
    """
    with files.writing(path):
        created = not path.exists()
        if path.is_symlink() or any((path / folder).is_symlink() for folder in SIDE_FOLDERS):
            raise UsageError(path, "is a link", "name the folder itself")
        if not created and not path.is_dir():
            raise UsageError(path, "is a file", "name a folder")
    files.make_folder(path)
    try:
        with files.lock(path / _LOCK):
            if not overwrite and set(files.list_folder(path)) - {_LOCK}:
                what = "holds a finished merge" if (path / MANIFEST).exists() else "is not empty"
                raise UsageError(path, what, "choose another folder or add --overwrite")
            output = OutputFolder(path)
            output.recover()
            output.discard()
            try:
                yield output
            except BaseException:
                with contextlib.suppress(AcemergeError):
                    output.discard()
                raise
    finally:
        if created:
            files.remove_folder(path)


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
