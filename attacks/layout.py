"""Row 3: headers whose names stand twice, or whose tensors overlap, leave holes or do not end with the file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.checkpoints.folder import open_file
from attacks import models
from attacks.harness import Tally, check, clean, main
from attacks.mutate import Table, parsed, written

ROW = 3
FULL = 2_000
_LEAST = 40  # distinct kinds of damage, whatever the count

# Changes the table of tensors and returns by how many bytes the data grow.
Damage = Callable[[Table, random.Random], int]


def attack(folder: Path, count: int, seed: int) -> Tally:
    tally, path = Tally(), folder / "x.safetensors"
    seen: set[bytes] = set()
    for i in range(max(count, _LEAST)):
        rng = random.Random(f"{seed} {i}")
        label, content = _case(_DAMAGES[i % len(_DAMAGES)], rng)
        while content in seen:
            label, content = _case(rng.choice(_DAMAGES), rng)
        seen.add(content)
        models.overwrite(path, content)
        clean(tally, f"{label} in case {i} of seed {seed}", partial(open_file, path), must="refuse")
    check(len(seen) >= _LEAST, "the cases are not distinct")
    models.overwrite(path, models.content(models.TENSORS))
    clean(tally, "the undamaged file", partial(open_file, path), must="accept")
    return tally


def _case(damage: Damage, rng: random.Random) -> tuple[str, bytes]:
    """A file of some random tensors with one damage to its layout."""
    types = rng.choices(sorted(models.SIZES), k=rng.randint(3, 8))
    tensors = {f"t{i}": (dtype, (rng.randint(1, 6), rng.randint(1, 5))) for i, dtype in enumerate(types)}
    table = parsed(json.dumps(models.entries(tensors)).encode())
    growth = damage(table, rng)
    size = max(len(models.data(tensors)) + growth, 0)
    return damage.__name__.strip("_").replace("_", " "), models.framed(written(table), rng.randbytes(size))


def _tensors(table: Table) -> list[tuple[str, Table]]:
    return [(name, entry) for name, entry in table.pairs if name != "__metadata__"]


def _offsets(entry: Table) -> list[int]:
    found: list[int] = dict(entry.pairs)["data_offsets"]
    return found


def _shift(entry: Table, by: int) -> None:
    offsets = _offsets(entry)
    offsets[:] = [offset + by for offset in offsets]


def _nbytes(entry: Table) -> int:
    first, end = _offsets(entry)
    return end - first


def _name_twice(table: Table, rng: random.Random) -> int:
    table.pairs.append(rng.choice(_tensors(table)))
    return 0


def _name_twice_as_another_type(table: Table, rng: random.Random) -> int:
    name, entry = rng.choice(_tensors(table))
    twin: list[tuple[str, Any]] = [("dtype", "U8"), ("shape", [_nbytes(entry)]), ("data_offsets", _offsets(entry))]
    table.pairs.insert(rng.randrange(len(table.pairs)), (name, Table(twin)))
    return 0


def _metadata_twice(table: Table, rng: random.Random) -> int:
    table.pairs.insert(rng.randrange(len(table.pairs)), ("__metadata__", Table([("format", "pt")])))
    return 0


def _key_of_metadata_twice(table: Table, rng: random.Random) -> int:
    table.pairs[0][1].pairs.append(("format", rng.choice(("pt", "np", "tf"))))
    return 0


def _field_twice(table: Table, rng: random.Random) -> int:
    _, entry = rng.choice(_tensors(table))
    entry.pairs.append(rng.choice(entry.pairs))
    return 0


def _overlap(table: Table, rng: random.Random) -> int:
    """All tensors from one on move into the one before it."""
    tensors = _tensors(table)
    at = rng.randrange(1, len(tensors))
    by = rng.randint(1, _nbytes(tensors[at - 1][1]))
    for _, entry in tensors[at:]:
        _shift(entry, -by)
    return -by


def _same_place(table: Table, rng: random.Random) -> int:
    """A tensor in the place of another, its own place left empty."""
    (_, one), (_, two) = rng.sample(_tensors(table), 2)
    _shift(two, _offsets(one)[0] - _offsets(two)[0])
    return 0


def _alias(table: Table, rng: random.Random) -> int:
    """Another name for a place that is in use."""
    _, entry = rng.choice(_tensors(table))
    table.pairs.append(("alias", entry))
    return 0


def _empty_tensor_inside_another(table: Table, rng: random.Random) -> int:
    wide = [entry for _, entry in _tensors(table) if _nbytes(entry) > 1] or [Table([("data_offsets", [0, 2])])]
    first, end = _offsets(rng.choice(wide))
    at = rng.randrange(first + 1, end)
    table.pairs.append(("none", Table([("dtype", "F32"), ("shape", [0]), ("data_offsets", [at, at])])))
    return 0


def _empty_tensor_beyond_the_end(table: Table, rng: random.Random) -> int:
    end = max(_offsets(entry)[1] for _, entry in _tensors(table)) + rng.randint(1, 9)
    table.pairs.append(("none", Table([("dtype", "F32"), ("shape", [3, 0]), ("data_offsets", [end, end])])))
    return 0


def _hole(table: Table, rng: random.Random) -> int:
    tensors, by = _tensors(table), rng.randint(1, 64)
    for _, entry in tensors[rng.randrange(len(tensors)) :]:  # from the first on: a late start
        _shift(entry, by)
    return by


def _missing_tensor(table: Table, rng: random.Random) -> int:
    table.pairs.remove(rng.choice(_tensors(table)))
    return 0


def _trailing_bytes(table: Table, rng: random.Random) -> int:
    return rng.randint(1, 4096)


def _missing_bytes(table: Table, rng: random.Random) -> int:
    return -rng.randint(1, 30) if rng.random() < 0.9 else -(10**6)


def _reversed_offsets(table: Table, rng: random.Random) -> int:
    _offsets(rng.choice(_tensors(table))[1]).reverse()
    return 0


def _shape_that_disagrees(table: Table, rng: random.Random) -> int:
    shape = dict(rng.choice(_tensors(table))[1].pairs)["shape"]
    shape[rng.randrange(2)] += rng.choice((1, 7, 2**31, 2**40))
    return 0


def _negative_offsets(table: Table, rng: random.Random) -> int:
    for _, entry in _tensors(table):
        _shift(entry, -rng.randint(1, 8))
    return 0


_DAMAGES: tuple[Damage, ...] = (
    _name_twice, _name_twice_as_another_type, _metadata_twice, _key_of_metadata_twice, _field_twice, _overlap,
    _same_place, _alias, _empty_tensor_inside_another, _empty_tensor_beyond_the_end, _hole, _missing_tensor,
    _trailing_bytes, _missing_bytes, _reversed_offsets, _shape_that_disagrees, _negative_offsets,
)  # fmt: skip

if __name__ == "__main__":
    main(("layout",))
