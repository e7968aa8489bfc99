"""Row 4: every file of a sharded checkpoint cut at each boundary of its structure, and at random places."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path

import torch

from acemerge.checkpoints.folder import open_checkpoint
from attacks import models
from attacks.harness import Tally, clean, main

ROW = 4
FULL = 1_000  # random places, besides all boundaries
_WEIGHT_FILES = 5
_TENSORS = {**models.TENSORS, **{f"layers.{i}.weight": ("F32", (40, 8)) for i in range(1, 7)}}
_TOKEN = re.compile(rb'"[^"]*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, rng = Tally(), random.Random(seed)
    safe = models.write_sharded(folder / "safetensors", total=3, tensors=_TENSORS)
    pickled = _write_pickled(folder / "pickled")
    for place, allow_pickle in ((safe, False), (pickled, True)):
        opened = partial(open_checkpoint, place, allow_pickle)
        clean(tally, f"the whole {place.name}", opened, must="accept")
        for file in sorted(place.iterdir()):
            content = file.read_bytes()
            places = range(len(content))
            few = rng.sample(places, min(count // _WEIGHT_FILES + 1, len(content)))
            drawn = places if file.suffix == ".json" else few  # of a small file every place
            for length in sorted({*_boundaries(file, content), *drawn}):
                models.overwrite(file, content[:length])
                label = f"{file.name} cut to {length} of {len(content)} bytes"
                clean(tally, label, opened, must="refuse")
            models.overwrite(file, content)
        clean(tally, f"the whole {place.name} again", opened, must="accept")
    return tally


def _boundaries(file: Path, content: bytes) -> set[int]:
    """Where one part of a file of weights ends and the next begins, and a byte to each side."""
    if file.suffix == ".safetensors":
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        ends = {start + offset for entry in entries.values() for offset in entry.get("data_offsets", ())}
        edges = {0, 7, 8, start} | ends | {8 + token.end() for token in _TOKEN.finditer(content[8:start])}
    else:  # an archive: its records' headers, contents and directory begin with PK
        edges = {match.start() for match in re.finditer(b"PK", content)}
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    return {length for length in near if 0 <= length < len(content)}


def _write_pickled(folder: Path) -> Path:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for i in (1, 2):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({f"layers.{i}.weight": torch.ones(40, 8), f"layers.{i}.bias": torch.ones(4)}, folder / file)
        weight_map |= {f"layers.{i}.{part}": file for part in ("weight", "bias")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


if __name__ == "__main__":
    main(("truncation",))
