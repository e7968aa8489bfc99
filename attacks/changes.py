"""Row 10: an input is written to while it is merged. The output is of the one or of the other, or there is none."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attacks.faulty import faulty, unfaulty
from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, content

ROW, FULL = 10, 100
_LAYERS, _SIDE = 24, 384  # read in several batches


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Each way of changing a shard of each model, at random calls of the run; half the times set back after it."""
    tally, rng = Tally(), random.Random(seed)
    case = Case(folder, "ace", layers=_LAYERS, side=_SIDE)
    with faulty(0, unfaulty) as counting:
        case.merge(folder / "counted")
    ways = [_flip, _replace, _truncate, _append]
    for trial in range(count):
        model = (case.base, *case.experts)[trial % 3]
        file = rng.choice(sorted(model.glob("*.safetensors")))
        way, k, set_back = ways[trial % len(ways)], rng.randrange(counting.count), bool(rng.randrange(2))
        label = f"{way.__name__[1:]} {model.name}/{file.name} before call {k} of {counting.count}"
        clean(tally, label, partial(_merge_while, case, file, way, k, set_back))
    return tally


def _merge_while(case: Case, file: Path, way: Callable[[Path], None], k: int, set_back: bool) -> None:
    original, state = file.read_bytes(), file.stat()
    out = case.folder / "out"
    shutil.rmtree(out, ignore_errors=True)

    def change(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        way(file)
        if set_back:
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        return call(*arguments, **options)

    try:
        with faulty(k, change):
            case.merge(out)
        found = content(out)
        shutil.rmtree(out)
        if _weights(found) != _weights(case.expected):  # then it is all of the changed input's
            case.merge(out)
            check(_weights(found) == _weights(content(out)), "a mixture of both inputs")
    finally:
        file.write_bytes(original)


def _weights(found: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in found.items() if name.endswith(".safetensors")}


def _flip(file: Path) -> None:
    """The lowest bit of the last float32: the file is as good as before, but another."""
    with open(file, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        lowest = stream.read(1)[0]
        stream.seek(-4, os.SEEK_END)
        stream.write(bytes([lowest ^ 1]))


def _replace(file: Path) -> None:
    other = file.with_suffix(".new")
    shutil.copyfile(file, other)
    _flip(other)
    other.replace(file)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _append(file: Path) -> None:
    with open(file, "ab") as stream:
        stream.write(b"more")


if __name__ == "__main__":
    main(("changes",))
