"""Row 5: shards that are missing or too many, and indexes that do not fit: refused before any tensor is read."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import acemerge
from attacks import models
from attacks.harness import Tally, check, clean, main

ROW = 5
FULL = 400
_TOTAL = 3

# Spoils a folder of shards; returns what was done.
Damage = Callable[[Path, random.Random], str]


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally = Tally()
    good = models.write_sharded(folder / "good", _TOTAL)
    merged = partial(_merge, good, good, folder / "merged", must_read=True)
    clean(tally, "undamaged shards", merged, must="accept")
    for i in range(max(count, 2 * len(_DAMAGES))):
        rng = random.Random(f"{seed} {i}")
        bad = folder / "bad"
        shutil.copytree(good, bad)
        label = f"{_DAMAGES[i // 2 % len(_DAMAGES)](bad, rng)} in case {i} of seed {seed}"
        base, expert = (bad, good) if i % 2 else (good, bad)
        clean(tally, label, partial(_merge, base, expert, folder / "out"), must="refuse")
        shutil.rmtree(bad)
    return tally


def _merge(base: Path, expert: Path, out: Path, must_read: bool = False) -> None:
    """Merge; a breach where a tensor was read though the checkpoint is refused, or anything was left behind."""
    with _reads_of_tensors() as reads:
        try:
            acemerge.merge(base, [expert], method="average", out=out)
        except acemerge.AcemergeError:
            check(not reads, f"read tensors first: {reads[:3]}")
            check(not out.exists(), "left an output")
            raise
    check(not must_read or len(reads) > 0, "nothing was seen to be read: the trap is dead")


@contextlib.contextmanager
def _reads_of_tensors() -> Iterator[list[str]]:
    """Every read behind a shard's header, at the operating system's own calls."""
    seen: list[str] = []
    preadv, read = os.preadv, os.read

    def note(descriptor: int, end: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            if end > start:
                seen.append(f"{path.name} up to byte {end}")

    def noted_preadv(descriptor: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        note(descriptor, offset + sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset, *flags)

    def noted_read(descriptor: int, count: int) -> bytes:
        note(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) + count)
        return read(descriptor, count)

    with mock.patch.object(os, "preadv", noted_preadv), mock.patch.object(os, "read", noted_read):
        yield seen


# --- what is done to the folder -----------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def _tensors_of(i: int) -> models.Tensors:
    return models.split(models.TENSORS, _TOTAL)[i]


@contextlib.contextmanager
def _index(folder: Path) -> Iterator[dict[str, str]]:
    """The weight map, written back when the block ends."""
    path = folder / models.INDEX
    content = json.loads(path.read_text())
    yield content["weight_map"]
    path.write_text(json.dumps(content))


def _missing_shard(folder: Path, rng: random.Random) -> str:
    rng.choice(_shards(folder)).unlink()
    return "a missing shard"


def _extra_shard(folder: Path, rng: random.Random) -> str:
    name = models.shard_name(rng.randint(_TOTAL + 1, 99999), rng.choice((_TOTAL, 99999)))
    (folder / name).write_bytes(models.content({"extra.weight": ("F32", (2, 2))}))
    return "an extra shard"


def _shard_unlisted(folder: Path, rng: random.Random) -> str:
    gone = rng.choice(_shards(folder)).name
    with _index(folder) as index:
        for name in [name for name, file in index.items() if file == gone]:
            del index[name]
    return "a shard that the index does not name"


def _missing_index(folder: Path, rng: random.Random) -> str:
    (folder / models.INDEX).unlink()
    return "a missing index"


def _empty_index(folder: Path, rng: random.Random) -> str:
    content = rng.choice(("{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', ""))
    (folder / models.INDEX).write_text(content)
    return f"the index {content!r}"


def _tensor_not_listed(folder: Path, rng: random.Random) -> str:
    with _index(folder) as index:
        del index[rng.choice(list(index))]
    return "a tensor that the index does not name"


def _tensor_invented(folder: Path, rng: random.Random) -> str:
    with _index(folder) as index:
        index[f"invented.{rng.randrange(10**6)}"] = rng.choice(list(index.values()))
    return "a tensor that only the index names"


def _tensor_elsewhere(folder: Path, rng: random.Random) -> str:
    with _index(folder) as index:
        name = rng.choice(list(index))
        index[name] = rng.choice([file for file in index.values() if file != index[name]])
    return "a tensor in another shard than the index says"


def _shards_exchanged(folder: Path, rng: random.Random) -> str:
    one, two = rng.sample(_shards(folder), 2)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return "two shards under each other's names"


def _tensor_in_two_shards(folder: Path, rng: random.Random) -> str:
    i, j = rng.sample(range(_TOTAL), 2)
    name = rng.choice(list(_tensors_of(i)))
    _shards(folder)[j].write_bytes(models.content({**_tensors_of(j), name: models.TENSORS[name]}))
    return "a tensor in two shards"


def _tensor_too_many(folder: Path, rng: random.Random) -> str:
    i = rng.randrange(_TOTAL)
    _shards(folder)[i].write_bytes(models.content({**_tensors_of(i), "stray.weight": ("F32", (2, 2))}))
    return "a tensor too many in a shard"


def _tensor_too_few(folder: Path, rng: random.Random) -> str:
    i = rng.randrange(_TOTAL)
    _shards(folder)[i].write_bytes(models.content(dict(list(_tensors_of(i).items())[1:])))
    return "a tensor too few in a shard"


def _whole_model_beside(folder: Path, rng: random.Random) -> str:
    (folder / models.SINGLE).write_bytes(models.content(models.TENSORS))
    if rng.random() < 0.5:
        (folder / models.INDEX).unlink()
    return "a whole model beside the shards"


def _shard_is_folder(folder: Path, rng: random.Random) -> str:
    shard = rng.choice(_shards(folder))
    shard.unlink()
    shard.mkdir()
    return "a shard that is a folder"


def _index_is_folder(folder: Path, rng: random.Random) -> str:
    (folder / models.INDEX).unlink()
    (folder / models.INDEX).mkdir()
    return "an index that is a folder"


def _shard_is_pipe(folder: Path, rng: random.Random) -> str:
    shard = rng.choice(_shards(folder))
    shard.unlink()
    os.mkfifo(shard)
    return "a shard that is a pipe"


def _empty_shard(folder: Path, rng: random.Random) -> str:
    rng.choice(_shards(folder)).write_bytes(rng.choice((b"", models.framed(b"{}"))))
    return "an empty shard"


def _index_names_the_index(folder: Path, rng: random.Random) -> str:
    with _index(folder) as index:
        index[rng.choice(list(index))] = rng.choice((models.INDEX, "config.json", "", ".", ".safetensors"))
    return "an index that names what is no shard"


_DAMAGES: tuple[Damage, ...] = (
    _missing_shard, _extra_shard, _shard_unlisted, _missing_index, _empty_index, _tensor_not_listed, _tensor_invented,
    _tensor_elsewhere, _shards_exchanged, _tensor_in_two_shards, _tensor_too_many, _tensor_too_few,
    _whole_model_beside, _shard_is_folder, _index_is_folder, _shard_is_pipe, _empty_shard, _index_names_the_index,
)  # fmt: skip

if __name__ == "__main__":
    main(("shards",))
