"""Row 23: one bit of an output is flipped: `acemerge verify` finds it."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from acemerge.output.verify import verify
from attacks.harness import Tally, clean, main
from attacks.merging import Case

ROW, FULL = 23, 500


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Every file in turn: shards, index, masks, heads, card, configuration, manifest."""
    tally, rng, out = Tally(), random.Random(seed), folder / "reference"
    Case(folder, "emr")
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    for trial in range(count):
        path = paths[trial % len(paths)]
        good = path.read_bytes()
        at, bit = rng.randrange(len(good)), rng.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        clean(tally, f"{path.name}, bit {bit} of byte {at}", partial(verify, out), must="refuse")
        path.write_bytes(good)
    verify(out)
    return tally


if __name__ == "__main__":
    main(("bit_flips",))
