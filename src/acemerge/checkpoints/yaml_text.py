"""YAML that others wrote, read as plain data within bounds: from the parser's events, never by tags that make objects.

Scalars are text, integers, floats, booleans and null as PyYAML takes them, but a date is text. There are no merge keys
and no other tags; an alias counts with all that it stands for, so that nothing grows when it is walked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_NODES = 50_000
_MAX_DEPTH = 64
_MAX_ALIASES = 200
_LONGEST_NUMBER = 100  # characters
_PREFIX = "tag:yaml.org,2002:"
_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_SIGNED = re.compile(r"([-+]?)(0b[01]+|0x[0-9a-f]+|0o?[0-7]+|[0-9]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?")
_NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.resolver.Resolver()


class YamlError(ValueError):
    """Text that is no YAML, or YAML that is not read here; says where."""


class SeveralDocumentsError(YamlError):
    """Text that holds more than one document."""


def parse_yaml(text: str) -> Any:
    """The one document of a text, None where there is none. Raises YamlError."""
    try:
        return _Document(yaml.parse(text, Loader=_LOADER)).read()
    except (yaml.YAMLError, RecursionError, UnicodeError) as failure:
        raise YamlError(" ".join(str(failure).split())[:160]) from None


@dataclass
class _Document:
    """A document under construction; anchored values go with the number of nodes that they stand for."""

    events: Iterator[Any]
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    nodes: int = 0
    aliases: int = 0

    def read(self) -> Any:
        next(self.events)  # of the stream
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._value(next(self.events), 0)
        next(self.events)
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            raise SeveralDocumentsError(str(_error(event, "a second document begins; keep one")))
        return value

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(event, 1)
        if depth > _MAX_DEPTH:
            raise _error(event, f"nested more than {_MAX_DEPTH} levels deep")
        before = self.nodes - 1
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(event, depth)
        else:
            value = self._mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.nodes - before
        return value

    def _alias(self, event: Any) -> Any:
        self.aliases += 1
        if event.anchor not in self.anchors:  # not there, or around the alias itself
            raise _error(event, f"the alias *{event.anchor[:40]} stands for nothing before it")
        value, nodes = self.anchors[event.anchor]
        self._count(event, nodes)
        return value

    def _count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES or self.aliases > _MAX_ALIASES:
            raise _error(event, f"more than {MAX_NODES:,} values or {_MAX_ALIASES} aliases")

    def _sequence(self, event: Any, depth: int) -> list[Any]:
        _check_tag(event, "seq")
        values = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, event: Any, depth: int) -> dict[Any, Any]:
        _check_tag(event, "map")
        table: dict[Any, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                raise _error(event, "merge keys (<<) are not read here; write the keys out")
            key = self._value(event, depth + 1)
            if isinstance(key, list | dict):
                raise _error(event, "a key must be a word or a number")
            if key in table:
                raise _error(event, f"the key {str(key)[:40]!r} stands there twice")
            table[key] = self._value(next(self.events), depth + 1)
        return table


def _check_tag(event: Any, kind: str) -> None:
    if event.tag not in (None, "!", _PREFIX + kind):
        raise _error(event, f"the tag {event.tag[:60]!r} is not read here")


def _scalar(event: Any) -> str | int | float | bool | None:
    tag, value = event.tag, event.value
    if tag in (None, "!"):
        tag = _RESOLVER.resolve(yaml.ScalarNode, value, event.implicit) if event.implicit[0] else _PREFIX + "str"
        if tag.removeprefix(_PREFIX) in ("timestamp", "value", "merge"):
            return str(value)
    kind = tag.removeprefix(_PREFIX) if tag.startswith(_PREFIX) else tag
    if kind == "str":
        return str(value)
    if kind == "null":
        return None
    if kind not in ("bool", "int", "float"):
        raise _error(event, f"the tag {tag[:60]!r} is not read here")
    if kind == "bool" and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if len(value) > _LONGEST_NUMBER and kind != "bool":
        raise _error(event, f"a number of {len(value):,} characters is too long")
    number = None if kind == "bool" else _integer(value) if kind == "int" else _float(value)
    if number is None and ":" in value and event.tag is None:
        return str(value)  # 1:30 is no number of seconds
    if number is None:
        raise _error(event, f"{value[:40]!r} is no {kind}")
    return number


def _integer(text: str) -> int | None:
    found = _SIGNED.fullmatch(text.replace("_", "").lower())
    if found is None:
        return None
    sign, digits = found.groups()
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        digits = f"0o{digits[1:]}"  # as YAML 1.1 writes octal numbers
        if not re.fullmatch(r"0o[0-7]+", digits):
            return None
    return int(sign + digits, 0)


def _float(text: str) -> float | None:
    plain = text.replace("_", "").lower()
    if plain in _NOT_FINITE:
        return float(_NOT_FINITE[plain])
    return float(plain) if _FLOAT.fullmatch(plain) else None


def _error(event: Any, what: str) -> YamlError:
    return YamlError(f"line {event.start_mark.line + 1}: {what}")
