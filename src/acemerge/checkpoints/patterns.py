"""Regular expressions from a file, matched in bounded time.

An adapter's configuration gives modules their own rank by patterns that PEFT matches with Python's `re`, whose time may
grow exponentially. Here a pattern is what `re` parses, as an automaton without memory (Thompson 1968): its time is the
length of the name times the states of the automaton. What has no such automaton, as back references and lookarounds,
is refused.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_MAX_LENGTH = 1000
_MAX_STATES = 5000
# Steps for all names and patterns of one file: about a second.
_BUDGET = 1_000_000


class PatternError(ValueError):
    """A pattern that is none, cannot be matched without memory, or takes too long. Its text says which."""


_Test = Callable[[str], bool]
_Parsed = Sequence[tuple[Any, Any]]

_CATEGORIES: Mapping[str, _Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}
_BEGINNINGS, _ENDS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")


@dataclass
class _Automaton:
    """States by their numbers: `steps` lead on over a character, `jumps` over none, some at an end of the name only."""

    steps: dict[int, tuple[_Test, int]] = field(default_factory=dict)
    jumps: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    size: int = 0

    def state(self) -> int:
        self.size += 1
        if self.size > _MAX_STATES:
            raise PatternError("is too long when its repeats are written out")
        return self.size - 1

    def jump(self, start: int, end: int, where: str = "") -> None:
        self.jumps.setdefault(start, []).append((where, end))

    def add(self, parsed: _Parsed, start: int) -> int:
        """Lead on from `start` over what was parsed; the state behind it."""
        for operation, argument in parsed:
            start = self._one(str(operation), argument, start)
        return start

    def _one(self, operation: str, argument: Any, start: int) -> int:
        end = self.state()
        if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            self.steps[start] = _test(operation, argument), end
        elif operation == "AT" and str(argument) in (*_BEGINNINGS, *_ENDS):
            self.jump(start, end, "beginning" if str(argument) in _BEGINNINGS else "end")
        elif operation == "SUBPATTERN" and not argument[1] and not argument[2]:
            self.jump(self.add(argument[3], start), end)
        elif operation == "BRANCH":
            for each in argument[1]:
                first = self.state()
                self.jump(start, first)
                self.jump(self.add(each, first), end)
        elif operation in ("MAX_REPEAT", "MIN_REPEAT"):
            self._repeat(argument, start, end)
        else:
            raise PatternError(f"uses {operation.lower()}, which cannot be read")
        return end

    def _repeat(self, argument: tuple[int, Any, _Parsed], start: int, end: int) -> None:
        least, most, parsed = argument
        endless = most is _parser.MAXREPEAT
        if least > _MAX_STATES or (not endless and most > _MAX_STATES):
            raise PatternError("is too long when its repeats are written out")
        for _ in range(least):
            start = self._onward(parsed, start)
        if endless:
            loop = self.state()
            self.jump(start, loop)
            self.jump(self._onward(parsed, loop), loop)
            start = loop
        for _ in range(0 if endless else most - least):
            self.jump(start, end)
            start = self._onward(parsed, start)
        self.jump(start, end)

    def _onward(self, parsed: _Parsed, start: int) -> int:
        first = self.state()  # of its own, as `start` may have a step already
        self.jump(start, first)
        return self.add(parsed, first)


def _test(operation: str, argument: Any) -> _Test:
    if operation == "ANY":
        return lambda c: c != "\n"
    if operation == "LITERAL":
        return chr(argument).__eq__
    if operation == "NOT_LITERAL":
        return chr(argument).__ne__
    negated = bool(argument) and str(argument[0][0]) == "NEGATE"
    tests = [_member(str(kind), value) for kind, value in argument[negated:]]
    return lambda c: any(test(c) for test in tests) != negated


def _member(kind: str, value: Any) -> _Test:
    if kind == "LITERAL":
        return chr(value).__eq__
    if kind == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    return _CATEGORIES[str(value)]


@dataclass(frozen=True)
class Pattern:
    """A pattern of PEFT's, which stands for the end of a module's name, from the beginning of a part of it."""

    text: str
    _plain: re.Pattern[str] | None = field(default=None, repr=False)
    _automaton: _Automaton = field(default_factory=_Automaton, repr=False)
    _last: int = 0

    @staticmethod
    def read(text: Any, budget: Budget) -> Pattern:
        """PatternError for what is none."""
        if not isinstance(text, str) or len(text) > _MAX_LENGTH:
            raise PatternError("is no pattern" if not isinstance(text, str) else f"is longer than {_MAX_LENGTH}")
        budget.take(100 + 3 * len(text), text)  # as long as it takes to parse
        try:
            own = _parser.parse(text)
            if own.state.flags != re.UNICODE.value:
                raise PatternError("sets flags, which cannot be read")
            # Characters in a row are a matter of one look for `re`, too, and it is faster at it.
            if all(str(operation) in ("LITERAL", "ANY", "IN") for operation, _ in own):
                return Pattern(text, re.compile(rf"(?:.*\.)?(?:{text})$"))
            parsed = _parser.parse(rf"(?:.*\.)?(?:{text})$")
        except (re.error, RecursionError, OverflowError):
            raise PatternError("is no regular expression") from None
        automaton = _Automaton()
        last = automaton.add(list(parsed), automaton.state())
        budget.take(10 * automaton.size, text)  # as long as it takes to make
        return Pattern(text, None, automaton, last)

    def matches(self, name: str, budget: Budget) -> bool:
        budget.take(2, self.text)
        if self._plain is not None:
            return self._plain.match(name) is not None
        now = self._reached({0}, 0, len(name))
        for i, character in enumerate(name, 1):
            budget.take(len(now), self.text)
            steps = (self._automaton.steps[state] for state in now if state in self._automaton.steps)
            now = self._reached({end for test, end in steps if test(character)}, i, len(name))
            if not now:
                return False
        return self._last in now

    def _reached(self, states: set[int], place: int, length: int) -> set[int]:
        """These states and all that no character leads on to at this place in the name."""
        waiting = list(states)
        while waiting:
            for where, end in self._automaton.jumps.get(waiting.pop(), ()):
                open_here = not where or (place == 0 if where == "beginning" else place == length)
                if open_here and end not in states:
                    states.add(end)
                    waiting.append(end)
        return states


@dataclass
class Budget:
    """Steps that are left for one file."""

    left: int = _BUDGET

    def take(self, steps: int, pattern: str) -> None:
        self.left -= steps
        if self.left < 0:
            raise PatternError(f"takes too long to match, at the pattern {pattern[:80]!r}")


@dataclass(frozen=True)
class PatternTable:
    """A value for each pattern; names get that of the first pattern that matches, in the order of the file."""

    entries: tuple[tuple[Pattern, float], ...] = ()
    budget: Budget = field(default_factory=Budget, compare=False)

    def find(self, name: str, default: float) -> float:
        """PatternError where all patterns and names together take too long."""
        return next((value for pattern, value in self.entries if pattern.matches(name, self.budget)), default)
