"""Row 2: files that are too large, too small or too deep: refused within a second and 200 MB.

Seconds are of the processor, so that a busy machine gives the same verdict.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from acemerge.checkpoints.config import MAX_CONFIG
from acemerge.checkpoints.folder import open_checkpoint, open_file
from acemerge.checkpoints.header import MAX_HEADER, MAX_TENSORS
from attacks import models
from attacks.harness import Meter, Must, Tally, clean, in_child, main

ROW = 2
FULL = 115
SECONDS, NBYTES = 1.0, 200_000_000

# A text as it is built when its turn comes, so that one at a time is in memory.
Maker = Callable[[], bytes]
_EMPTY = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@dataclass(frozen=True)
class Case:
    label: str
    file: Path
    make: Maker
    call: Callable[[], object]
    must: Must = "refuse"
    hollow: int = 0  # bytes of the file that are not written, and take no room on the disk


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them."""
    return in_child(some_cases, folder, count, seed, timeout=300)


def some_cases(folder: Path, count: int, seed: int) -> Tally:
    tally = Tally()
    header, sharded = folder / "x.safetensors", models.write_sharded(folder / "sharded")
    alone = models.write_single(folder / "alone")
    for good in (sharded, alone):  # what is loaded once for all is no cost of a bad file
        clean(tally, f"{good.name} as it should be", partial(open_checkpoint, good), must="accept")
    cases = [*_of_headers(header), *_of_json(sharded / models.INDEX), *_of_json(alone / "config.json")]
    for case in random.Random(seed).sample(cases, min(count, len(cases))):
        try_case(tally, case)
    return tally


def try_case(tally: Tally, case: Case) -> None:
    case.file.unlink(missing_ok=True)
    with open(case.file, "wb") as file:
        file.write(case.make())
        file.truncate(file.tell() + case.hollow)
    clean(tally, case.label, case.call, case.must, Meter(SECONDS, NBYTES))


def _of_headers(file: Path) -> Iterator[Case]:
    call = partial(open_file, file)
    for label, make in (*_frames(), *_headers()):
        yield Case(label, file, make, call)
    for hollow in (1 << 30, 1 << 40):
        yield Case(f"{hollow:,} bytes too many", file, partial(models.content, models.TENSORS), call, hollow=hollow)


def _of_json(file: Path) -> Iterator[Case]:
    # A configuration may hold anything, as long as it costs little.
    must: Must = "refuse" if file.name == models.INDEX else "either"
    for label, make in _texts(MAX_CONFIG):
        yield Case(f"{file.name}: {label}", file, make, partial(open_checkpoint, file.parent), must)


def _frames() -> Iterator[tuple[str, Maker]]:
    """Files too short for a header, and lengths that no header has."""
    for size in range(9):
        yield f"a file of {size} bytes", partial(bytes, size)
    for length in (1, 2**24 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        prefix = length.to_bytes(8, "little")
        yield f"a header of {length:,} bytes in an empty file", partial(bytes, prefix)
        yield f"a header of {length:,} bytes in a short file", partial(bytes, prefix + b"{")


def _headers() -> Iterator[tuple[str, Maker]]:
    for label, text in _texts(MAX_HEADER):
        yield f"header: {label}", partial(_framed, text)
    yield "header: one byte over the limit", partial(_framed, partial(_filled, b"{", b" ", b"}", MAX_HEADER + 1, b""))
    yield "header: 1.3 million empty tensors", partial(_framed, partial(_tensors, 1_300_000))
    yield "header: one tensor too many", partial(_framed, partial(_tensors, MAX_TENSORS + 1))
    most = MAX_HEADER // (len(_EMPTY) + 5)
    yield "header: as many tensors as fit", partial(_framed, partial(_tensors, most))


def _framed(text: Maker) -> bytes:
    return models.framed(text())


def _tensors(count: int) -> bytes:
    return ("{" + ",".join(_EMPTY % i for i in range(count)) + "}").encode()


def _texts(most: int) -> Iterator[tuple[str, Maker]]:
    """JSON of `most` bytes that is dear to read, and none of it a model's."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b'{"weight_map":{"a":', b"}}"), (b'[{"a":[', b"]}]")):
        for depth in (900, 100_000, most // (len(opening) + len(closing) + 1)):
            yield f"{depth:,} times {opening.decode()}", partial(_nested, opening, closing, depth)
    items = (b"[]", b"{}", b"[[]]", b'{"a":0}', b'"ab"', b"1.5", b"0", b"-1e9", b"null", b'"\\u00e9\\ud83d\\ude00"')
    for item in items:
        yield f"a list of {item.decode()}", partial(_filled, b'{"a":[', item, b"]}", most)
    yield "a table of one key", partial(_filled, b"{", b'"a":0', b"}", most)
    yield "a table of many keys", partial(_many_keys, most)
    yield "one long name", partial(_filled, b'{"', b"a", b'":0}', most, b"")
    yield "one long name in another script", partial(_filled, '{"é😀'.encode(), b"a", b'":0}', most, b"")
    yield "one long number", partial(_filled, b'{"a":', b"9", b"}", most, b"")
    yield "no JSON", partial(_filled, b"", b"\xff", b"", most, b"")


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + b"1" + closing * depth


def _many_keys(most: int) -> bytes:
    return b"{" + b",".join(b'"%x":0' % i for i in range(most // 11)) + b"}"


def _filled(start: bytes, item: bytes, end: bytes, most: int, between: bytes = b",") -> bytes:
    """`most` bytes, or a few less, of one item over and over."""
    room = most - len(start) - len(end)
    return start + (item + between) * (room // len(item + between) - 1) + item + end


if __name__ == "__main__":
    main(("oversize",))
