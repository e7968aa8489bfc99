"""The folders that were named at start: what may be merged in them, and nothing outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.config import CONFIG, read_config
from acemerge.checkpoints.weight_files import ADAPTER, INDEX, SINGLE
from acemerge.errors import AcemergeError, CheckpointError, UsageError, printable

_DEEPEST = 8
_MOST_FOLDERS = 20_000


@dataclass(frozen=True)
class Found:
    """A checkpoint that may be picked: its path as a recipe has it, its size, and what it is if that is known."""

    name: str
    nbytes: int
    kind: str


@dataclass(frozen=True)
class Listing:
    """The checkpoints that were found, and a line on everything that looks like one but may not be picked."""

    found: tuple[Found, ...]
    passed_over: tuple[str, ...]


class Folders:
    """The folders named at start, with their links followed. CheckpointError where one is not there."""

    def __init__(self, named: Sequence[Path]) -> None:
        for path in named:
            if files.kind(files.resolve(path)) != "folder":
                raise CheckpointError(path, "no such folder", "name folders that hold checkpoints")
        self.roots = tuple(dict.fromkeys(files.resolve(path) for path in named))
        self._here = files.resolve(Path())

    def name(self, path: Path) -> str:
        """A path as a recipe has it: beginning with `./` within the current folder, which no Hub id does."""
        return f"./{path.relative_to(self._here)}" if path.is_relative_to(self._here) else str(path)

    def inside(self, text: str) -> Path:
        """The path that a name stands for, all links followed. UsageError where it leads outside."""
        path = files.resolve(Path(text.strip()))
        if not self._holds(path):
            named = ", ".join(map(str, self.roots))
            raise UsageError(text.strip(), "lies outside the folders named at start", f"use one inside {named}")
        return path

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)

    def find(self) -> Listing:
        """Every checkpoint in the folders. Links are not descended into; hidden folders are left out."""
        found: dict[Path, Found] = {}
        passed_over: list[str] = []
        waiting = [(root, 0) for root in reversed(self.roots)]
        for _ in range(_MOST_FOLDERS):
            if not waiting:
                break
            folder, depth = waiting.pop()
            try:
                names = files.list_folder(folder)
                if folder not in found and _looks_like_one(names):
                    _check_text(folder)
                    found[folder] = self._checkpoint(folder, names)
                below, leading_out = self._below(folder, names)
            except AcemergeError as failure:
                passed_over.append(str(failure))
                continue
            passed_over += leading_out
            waiting += [(path, depth + 1) for path in reversed(below) if depth < _DEEPEST]
        if waiting:
            passed_over.append(f"more than {_MOST_FOLDERS:,} folders: the rest was not looked at; name a smaller one")
        return Listing(tuple(found.values()), tuple(passed_over))

    def _below(self, folder: Path, names: Sequence[str]) -> tuple[list[Path], list[str]]:
        """The folders in a folder, and a line on every link to one outside."""
        below, leading_out = [], []
        for path in (folder / name for name in names if not name.startswith(".")):
            kind = files.kind(path)
            if kind == "folder":
                below.append(path)
            elif kind == "link":
                target = files.resolve(path)
                if files.kind(target) == "folder" and not self._holds(target):
                    leading_out.append(f"{self.name(path)}: is a link that leads outside the folders named at start")
        return below, leading_out

    def _checkpoint(self, folder: Path, names: Sequence[str]) -> Found:
        weights = [self.inside(str(folder / name)) for name in names if name.endswith(".safetensors")]
        kind = "LoRA"
        if not _is_adapter(names):
            config = read_config(self.inside(str(folder / CONFIG))) if CONFIG in names else {}
            kind = printable(str(config.get("model_type", ""))[:40])
        return Found(self.name(folder), sum(files.fingerprint(path)[0] for path in weights), kind)


def _check_text(path: Path) -> None:
    """CheckpointError for a name with half a character in it, which no page may hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(path, "its name is no text in UTF-8", "rename the folder") from None


def _looks_like_one(names: Sequence[str]) -> bool:
    return SINGLE in names or INDEX in names or _is_adapter(names)


def _is_adapter(names: Sequence[str]) -> bool:
    return set(ADAPTER) <= set(names) and SINGLE not in names and INDEX not in names
