"""Damage to JSON that keeps its structure: tables may have a key twice, numbers may be written in any way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Table:
    """A JSON object as it is written: pairs in order, keys not necessarily distinct."""

    pairs: list[tuple[str, Any]]


@dataclass(frozen=True)
class Verbatim:
    """Text that stands in the JSON as it is."""

    text: str


def parsed(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=Table)


def written(value: Any) -> bytes:
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Table):
        return "{" + ",".join(f"{json.dumps(key)}:{_text(item)}" for key, item in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return value.text if isinstance(value, Verbatim) else json.dumps(value)


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 63, 64, 2**31, 2**32 - 1, 2**48, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**30, 0.5, -0.0, 4.0, 1e300, "", "0", "8", "F32", "BF16", "F64", "I64", "BOOL", "f32", "F8_E4M3",
    "F4", "C64", "U32", "\0", "a\nb", "\x1b[2J", "../x", "/etc/passwd", "a\\b", "\u202e", "\ud800", "é", "😀",
    "x" * 600, "__metadata__", "dtype", "weight_map", "model.safetensors", "model-00001-of-00002.safetensors", [],
    [[]], [0], Verbatim("NaN"), Verbatim("-Infinity"), Verbatim("1e999"), Verbatim("-0"), Verbatim("4e0"),
    Verbatim("01"), Verbatim("+1"), Verbatim("0x10"), Verbatim("1_000"), Verbatim("'a'"), Verbatim('"\\ud83d"'),
    Verbatim('"\\u0000"'), Verbatim("9" * 5000), Verbatim("{}"), Verbatim(""), Verbatim("["), Verbatim("}"),
    Verbatim("/**/1"), *(Verbatim("[" * depth + "]" * depth) for depth in (60, 400, 940, 970, 985, 3000)),
    *(Verbatim('{"a":' * depth + "1" + "}" * depth) for depth in (30, 200, 480)),
)  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """One change somewhere in `value`, which is changed in place where it can be."""
    holders = [value, *_inner(value)]
    holder = rng.choice(holders)
    if isinstance(holder, Table) and (holder.pairs or rng.random() < 0.1):
        rng.choice(_TABLE_CHANGES)(holder, rng, holders)
    elif isinstance(holder, list) and (holder or rng.random() < 0.1):
        rng.choice(_LIST_CHANGES)(holder, rng, holders)
    elif holder is value:
        return _other(value, rng, holders)
    return value


def _inner(value: Any) -> list[Any]:
    """All tables and lists within a value."""
    items = [item for _, item in value.pairs] if isinstance(value, Table) else value if isinstance(value, list) else []
    found = [item for item in items if isinstance(item, Table | list)]
    return found + [deeper for item in found for deeper in _inner(item)]


def _other(value: Any, rng: random.Random, holders: Sequence[Any]) -> Any:
    """Something in the place of `value`: near it, of another kind, or hostile."""
    kind = rng.randrange(6)
    if kind == 0 and type(value) is int:
        return value + rng.choice((-8, -4, -1, 1, 4, 8)) if rng.random() < 0.6 else value * rng.choice((-1, 2, 0))
    if kind == 1 and type(value) is int:
        return rng.choice((float(value), str(value), bool(value), [value], Verbatim(f"{value}e0")))
    if kind == 2 and isinstance(value, str):
        return rng.choice((value.lower(), value[:-1], value + "x", [value], value + "\0", {"F32": "I32"}.get(value)))
    if kind == 3:
        return rng.choice(([_copied(value)], Table([("a", _copied(value))]), Table([])))
    return _copied(rng.choice(holders if kind == 4 else HOSTILE))


def _copied(value: Any) -> Any:
    """A copy whose parts are nobody else's: a value within itself could not be written."""
    if isinstance(value, Table):
        return Table([(key, _copied(item)) for key, item in value.pairs])
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _change_item(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    if table.pairs:
        at = rng.randrange(len(table.pairs))
        key, item = table.pairs[at]
        table.pairs[at] = (key, _other(item, rng, holders))


def _rename(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    if table.pairs:
        at = rng.randrange(len(table.pairs))
        names = [item for item in HOSTILE if isinstance(item, str)] + [key for key, _ in table.pairs]
        table.pairs[at] = (rng.choice(names), table.pairs[at][1])


def _drop(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    if table.pairs:
        del table.pairs[rng.randrange(len(table.pairs))]


def _double(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    if table.pairs:
        key, item = rng.choice(table.pairs)
        twin = _copied(item) if rng.random() < 0.5 else _other(item, rng, holders)
        table.pairs.insert(rng.randrange(len(table.pairs) + 1), (key, twin))


def _put(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    key = rng.choice(("a", "__metadata__", "shape", "weight_map", "metadata", "", "layers.0.up.weight"))
    table.pairs.insert(rng.randrange(len(table.pairs) + 1), (key, _other(None, rng, holders)))


def _reorder(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    rng.shuffle(table.pairs)


def _exchange(table: Table, rng: random.Random, holders: Sequence[Any]) -> None:
    """Two keys with each other's values."""
    if len(table.pairs) > 1:
        i, j = rng.sample(range(len(table.pairs)), 2)
        (a, one), (b, two) = table.pairs[i], table.pairs[j]
        table.pairs[i], table.pairs[j] = (a, two), (b, one)


_Change = Callable[[Any, random.Random, Sequence[Any]], None]
_TABLE_CHANGES: tuple[_Change, ...] = (
    _change_item, _change_item, _change_item, _rename, _drop, _double, _put, _reorder, _exchange,
)  # fmt: skip


def _change_element(items: list[Any], rng: random.Random, holders: Sequence[Any]) -> None:
    if items:
        at = rng.randrange(len(items))
        items[at] = _other(items[at], rng, holders)


def _resize(items: list[Any], rng: random.Random, holders: Sequence[Any]) -> None:
    if items and rng.random() < 0.5:
        del items[rng.randrange(len(items))]
    else:
        items.insert(rng.randrange(len(items) + 1), _copied(rng.choice(HOSTILE)))


def _shuffle(items: list[Any], rng: random.Random, holders: Sequence[Any]) -> None:
    rng.shuffle(items)


def _repeat(items: list[Any], rng: random.Random, holders: Sequence[Any]) -> None:
    items += [_copied(item) for _ in range(rng.choice((1, 2, 19))) for item in items]


_LIST_CHANGES: tuple[_Change, ...] = (_change_element, _change_element, _change_element, _resize, _shuffle, _repeat)


def damage_bytes(content: bytes, rng: random.Random, most: int) -> bytes:
    """Up to three bytes of the first `most` flipped, dropped, doubled or made special."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(min(most, len(damaged)), 1))
        action = rng.randrange(4)
        if action == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del damaged[at : at + rng.randint(1, 4)]
        elif action == 2:
            damaged[at:at] = damaged[at : at + rng.randint(1, 8)]
        else:
            damaged[at : at + 1] = rng.choice((b"\0", b"\xff", b'"', b"{", b"]", b",", b"\xef\xbb\xbf", b"\\u", b"9"))
    return bytes(damaged)
