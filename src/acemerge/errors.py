"""The typed errors. Each says where, what and the likely cure, and carries the command's exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

_LONGEST_VALUE = 80
_AGAIN = "run again"
# What pathlib makes of `s3://bucket/key`, wherever it stands in a message.
_SQUEEZED = re.compile(r"(?<![\w/.+:-])([a-z][a-z0-9+.-]+):/(?=[\w-])")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")


def printable(text: str) -> str:
    """The text with what is no character to be seen spelt out: it never breaks a line nor drives a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """The beginning of a value that somebody gave, which may be as long as a file."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def addressed(text: object) -> str:
    """A path, or words with paths in them, with addresses as people write them: `s3://bucket/key`."""
    return _SQUEEZED.sub(r"\1://", str(text))


@dataclass(frozen=True)
class Cure:
    """A cure that is another where models are in memory: these have no files, and merges of them fewer options.

    It may also be another for what lies in a store of objects, or is read from the Hub without a copy.
    """

    of_files: str
    in_memory: str
    in_store: str = ""
    on_hub: str = ""

    def because(self, reason: str) -> Cure:
        """The same, after what has probably happened."""
        told = (f"{reason}: {cure}" for cure in (self.of_files, self.in_memory, self.in_store, self.on_hub))
        return Cure(*told)

    def at(self, where: str) -> str:
        """That for the file, folder or address `where`."""
        if not _ADDRESS.match(where):
            return self.of_files
        return (self.on_hub if where.startswith("hf://") else self.in_store) or self.of_files


def fetching(what: str) -> Cure:
    """Of what is damaged or not there: a file is fetched, an object was to be put into its store, by whoever did."""
    return Cure(f"fetch {what}", f"load {what}", f"upload {what}", "choose a revision that has it whole")


class AcemergeError(Exception):
    """Base of every error that this library raises on purpose.

    `str(error)` is one line, `WHERE: WHAT; CURE`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: object, what: str, cure: str | Cure) -> None:
        self._cures = cure if isinstance(cure, Cure) else Cure(cure, cure)
        self.where, self.what = addressed(where), addressed(what)
        self.cure = addressed(self._cures.at(self.where))
        super().__init__(f"{self.where}: {self.what}; {self.cure}")

    @property
    def in_memory(self) -> AcemergeError:
        """The same error, with the cure for models that are no files."""
        return type(self)(self.where, self.what, self._cures.in_memory)

    @property
    def resumable(self) -> AcemergeError:
        """The same error of a merge whose work is kept: to run it again takes --resume."""
        if not self.cure.endswith(_AGAIN):
            return self
        return type(self)(self.where, self.what, f"{self.cure.removesuffix(_AGAIN)}go on with --resume")

    def __str__(self) -> str:
        return printable(self.args[0])  # input may hold control characters


class UsageError(AcemergeError):
    """Wrong arguments or a wrong recipe."""

    exit_code = 2


class CheckpointError(AcemergeError):
    """A checkpoint that is malformed, incomplete or incompatible with the others."""

    exit_code = 3


class UnreachableError(CheckpointError):
    """A store that holds an input does not give it now: a merge can be resumed."""


class NumericalError(AcemergeError):
    """Finite input gave a result that cannot be stored."""

    exit_code = 4


class ResourceError(AcemergeError):
    """The machine, or a limit on this process, has not enough of something: a merge can be resumed."""

    exit_code = 4


class WriteError(AcemergeError):
    """The output could not be written."""

    exit_code = 5


class LockedError(WriteError):
    """Another run writes there."""


_LONGEST = 200  # no name is longer, and looking for what is like a megabyte takes minutes


def nearest(word: str, choices: list[str], otherwise: str = "") -> str:
    """`did you mean X?` for the closest of `choices`, else the list of them, or `otherwise` where they are too many."""
    close = difflib.get_close_matches(word[:_LONGEST], choices, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else otherwise or f"use one of: {', '.join(choices)}"


# What libraries say when there is no memory, none of them by a type of its own.
_NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad[_ ]alloc"
    "|failed to map segment|unable to allocate|error return without exception set",
    re.IGNORECASE,
)
_ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_NO_THREAD = re.compile("can't start new thread|thread creation failed|thread constructor failed", re.IGNORECASE)
_PROCESS = "the process"


def shortage_of(failure: BaseException, where: object = _PROCESS) -> ResourceError | None:
    """The typed error where a failure says that memory, threads or open files ran out; `where` is what needed them."""
    said = str(failure)
    code = failure.errno if isinstance(failure, OSError) else None
    if code in (errno.EMFILE, errno.ENFILE) or (isinstance(failure, RuntimeError) and "Too many open files" in said):
        return ResourceError(where, "too many files are open", _after("raise the limit (ulimit -n)"))
    if isinstance(failure, RuntimeError) and _NO_THREAD.search(said):
        what = "no more threads can be started"
        return ResourceError(where, what, _after("raise the limit on processes or on memory (ulimit -u, -v)"))
    known = isinstance(failure, RuntimeError | ImportError | OSError | SystemError) and _NO_MEMORY.search(said)
    if isinstance(failure, MemoryError) or code == errno.ENOMEM or known:
        asked = _ASKED_FOR.search(said)
        what = f"there is not enough memory{f': {asked[1]} could not be had' if asked else ''}"
        in_memory = "allow more, or merge folders, which are read piece by piece"
        return ResourceError(
            where, what, _after("allow more, or use fewer --workers or a smaller --max-memory", in_memory)
        )
    return None


def _after(cure: str, in_memory: str = "") -> Cure:
    """After that a merge of files goes on where it was."""
    return Cure(f"{cure}: --resume continues the merge", in_memory or cure)


@contextlib.contextmanager
def shortages(where: object = _PROCESS) -> Iterator[None]:
    """Turn what libraries raise for lack of memory, threads or open files into a ResourceError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ImportError, SystemError) as failure:
        found = shortage_of(failure, where)
        if found is None:
            raise
        raise found from failure
