"""What a pack needs from the Hub: its size is known before it is fetched, and the first run's commits stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from acemerge.api import run_opened
from acemerge.checkpoints import files
from acemerge.checkpoints.hub import HubId, What, parse_id
from acemerge.checkpoints.hub_files import fetch_files, is_cached, list_files
from acemerge.checkpoints.weight_files import needed_files
from acemerge.engine.convert import open_conversion
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.writer import write_file
from acemerge.reproduction.pack import Pack

INPUTS = "inputs.json"
_MOST = 16 << 20
_INDEX = re.compile(r"(?P<stem>\w+)\.(?P<ending>\w+)\.index\.json")
Key = tuple[What, str, str | None, str | None]


@dataclass(frozen=True)
class PackInput:
    """A model, or one split of a data set: `id` as the pack names it, and the bytes of its files in a commit."""

    what: What
    id: str
    commit: str
    sizes: Mapping[str, int]
    subset: str | None = None
    split: str | None = None

    @property
    def wanted(self) -> HubId:
        found = parse_id(self.id)
        assert found is not None  # the packs are ours
        return found

    @property
    def key(self) -> Key:
        return self.what, self.id, self.subset, self.split

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.id, self.subset, self.split) if part)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def is_pickled(self) -> bool:
        return any(name.endswith(".bin") for name in self.sizes)

    def to_fetch(self) -> int:
        """The bytes that are not in huggingface_hub's cache yet."""
        missing = (n for n in self.sizes if not is_cached(self.wanted, self.what, self.commit, n))
        return sum(self.sizes[name] for name in missing)


def find_inputs(pack: Pack, tasks: Sequence[str], out: Path | None, allow_pickle: bool) -> list[PackInput]:
    """All that is needed: of the commits that an earlier run in `out` had, else as the Hub says now."""
    known = {} if out is None else _read(out / INPUTS)
    models: list[Key] = [("model", model, None, None) for model in dict.fromkeys(pack.models)]
    data = [_data_key(task) for task in pack.tasks if task["name"] in tasks]
    found = []
    for key in (*models, *dict.fromkeys(data)):
        entry = known.get(key)
        if entry is None or (entry.is_pickled and not allow_pickle):
            entry = _of_model(key[1], allow_pickle) if key[0] == "model" else _of_data(key)
        found.append(entry)
    return found


def _data_key(task: Mapping[str, Any]) -> Key:
    return "data set", task["data"], task.get("subset"), task["split"]


def _of_model(model: str, allow_pickle: bool) -> PackInput:
    entry = PackInput("model", model, "", {})
    listing = list_files(entry.wanted, "model")
    names = needed_files(entry.wanted, list(listing.sizes), allow_pickle)
    for index in filter(None, map(_INDEX.fullmatch, names)):
        shard = re.compile(rf"{index['stem']}-\d{{5}}-of-\d{{5}}\.{index['ending']}")
        names = [*names, *filter(shard.fullmatch, listing.sizes)]
    return replace(entry, commit=listing.commit, sizes={name: listing.sizes[name] for name in names})


def _of_data(key: Key) -> PackInput:
    """The parquet files of a split: `SUBSET/SPLIT-*.parquet`, or `data/SPLIT-*.parquet` without a subset."""
    _, data, subset, split = key
    entry = PackInput("data set", data, "", {}, subset, split)
    listing = list_files(entry.wanted, "data set")
    names = re.compile(rf"{re.escape(subset or 'data')}/{re.escape(str(split))}-[^/]*\.parquet")
    sizes = {name: nbytes for name, nbytes in listing.sizes.items() if names.fullmatch(name)}
    if not sizes:
        what = f"has no files {subset or 'data'}/{split}-*.parquet"
        raise CheckpointError(
            f"data set {data}", what, "the data set has changed since the pack was written: report it"
        )
    return replace(entry, commit=listing.commit, sizes=sizes)


def fetch(inputs: Sequence[PackInput], out: Path, options: RunOptions) -> tuple[dict[str, str], dict[Key, str]]:
    """Fetch what is not cached: what is read for every model id, and the folder of every data set's split.

    Commits are kept in `out` first. A base that has pickled weights only is written as safetensors, as data.
    """
    known = _read(out / INPUTS) | {entry.key: entry for entry in inputs}
    write_file(out / INPUTS, json.dumps([asdict(entry) for entry in known.values()], indent=1).encode() + b"\n")
    places: dict[str, str] = {}
    data: dict[Key, str] = {}
    for entry in inputs:
        root = fetch_files(entry.wanted, entry.what, entry.commit, list(entry.sizes), options.quiet)
        if entry.what == "data set":
            data[entry.key] = str(root / (entry.subset or "data"))
        else:
            pinned = str(replace(entry.wanted, revision=entry.commit))
            places[entry.id] = _converted(pinned, out, options) if entry.is_pickled else pinned
    return places, data


def data_folders(pack: Pack, tasks: Sequence[str], data: Mapping[Key, str]) -> dict[str, str]:
    """The folder of each task's examples."""
    return {task["name"]: data[_data_key(task)] for task in pack.tasks if task["name"] in tasks}


def _converted(model: str, out: Path, options: RunOptions) -> str:
    folder = out / "models" / re.sub(r"[^\w.-]", "-", model, flags=re.ASCII)
    converting = replace(options, resume=True, push=None, report=False)
    run_opened(open_conversion(model, folder, converting), folder, converting)
    return str(folder)


def _read(path: Path) -> dict[Key, PackInput]:
    if files.kind(path) == "nothing":
        return {}
    try:
        found = [PackInput(**entry) for entry in json.loads(files.read_small(path, _MOST))]
    except (ValueError, TypeError):
        raise UsageError(path, "is not what acemerge wrote", "remove it, or choose another folder") from None
    return {entry.key: entry for entry in found}
