"""The typed errors. Each says where, what and the likely cure, and carries the command's exit code."""

from __future__ import annotations

import difflib
from typing import ClassVar


class AcemergeError(Exception):
    """Base of every error that this library raises on purpose.

    `str(error)` is one line, `WHERE: WHAT; CURE`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: object, what: str, cure: str) -> None:
        self.where, self.what, self.cure = str(where), what, cure
        super().__init__(f"{where}: {what}; {cure}")

    def __str__(self) -> str:
        # Input may hold control characters: a message never breaks its line nor drives the terminal.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in self.args[0])


class UsageError(AcemergeError):
    """Wrong arguments or a wrong recipe."""

    exit_code = 2


class CheckpointError(AcemergeError):
    """A checkpoint that is malformed, incomplete or incompatible with the others."""

    exit_code = 3


class NumericalError(AcemergeError):
    """Finite input gave a result that cannot be stored."""

    exit_code = 4


class WriteError(AcemergeError):
    """The output could not be written."""

    exit_code = 5


def nearest(word: str, choices: list[str]) -> str:
    """`did you mean X?` for the closest of `choices`, else the list of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"use one of: {', '.join(choices)}"
