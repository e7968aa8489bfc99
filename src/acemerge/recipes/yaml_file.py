"""YAML files that people write: read as data, checked by a model, and every wrong key answered with a cure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from acemerge.checkpoints import files
from acemerge.checkpoints.address import parse
from acemerge.checkpoints.hub import hub_id
from acemerge.checkpoints.yaml_text import SeveralDocumentsError, parse_yaml
from acemerge.errors import CheckpointError, UsageError, nearest

_MAX_FILE = 1 << 20
_LONGEST_MESSAGE = 300
KeyPath = tuple[int | str, ...]


def read_yaml(path: Path, what: str, first_keys: str) -> dict[str, Any]:
    """The table in a file; UsageError where there is none. `first_keys` say how such a file begins."""
    try:
        content = parse_yaml(files.read_small(path, _MAX_FILE).decode("utf-8"))
    except CheckpointError as failure:
        raise UsageError(path, failure.what, f"name the YAML file of the {what}") from None
    except SeveralDocumentsError:
        found = "holds several documents, as files of mergekit-multi do, which merge one after the other"
        cure = "put each into a file of its own, merge them in turn, and give the folder of each to the next"
        raise UsageError(path, found, cure) from None
    except ValueError as failure:  # of bytes that are no text, too
        raise UsageError(path, f"not valid YAML ({str(failure)[:160]})", "mend the file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(path, "not a table of keys", f"begin with {first_keys}")
    return content


def relative_to(folder: Path, path: str) -> str:
    """A path relative to the folder of the file that names it; an address stays as it is, and a Hub id where no such
    path exists.
    """
    if parse(path) is not None or hub_id(path, folder) is not None:
        return path
    return str(folder / expanded(path))


def expanded(path: str) -> str:
    """A path with the home folder in the place of `~`."""
    with contextlib.suppress(RuntimeError):  # ~nobody: left as it is, to be reported as missing
        return str(Path(path).expanduser())
    return path


def explain(
    failure: ValidationError, where: object, owner: Callable[[KeyPath], type[BaseModel]], fill: str, see: str
) -> UsageError:
    """The first problem of a validation, with the nearest right key for a wrong one.

    `owner` is the model that a key's place belongs to, `fill` the cure of an empty list, `see` that of a wrong value
    where a check of our own does not say one, as `WHAT; CURE`.
    """
    # A misspelt key is also a missing one: say what is there before what is not.
    first = min(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    place = ".".join(str(part)[:60] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        keys = list(owner(first["loc"]).model_fields)
        return UsageError(where, f"unknown key {place!r}", nearest(str(first["loc"][-1]), keys))
    if first["type"] == "missing":
        return UsageError(where, f"the key {place!r} is missing", "add it")
    if first["type"] == "too_short":
        return UsageError(where, f"{place!r} is empty", fill)
    if first["type"] == "value_error":  # of our own, which say the cure, too
        what, semicolon, cure = str(first["ctx"]["error"]).rpartition("; ")
        what, cure = (what, cure) if semicolon else (cure, see)
        return UsageError(where, f"{place!r}: {what}" if place else what, cure)
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return UsageError(where, f"{place!r} is {_shown(first['input'])!r}", nearest(str(first["input"])[:60], choices))
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        return UsageError(where, f"{place!r}: YAML takes {_shown(first['input'])!r} for no text", "put it in quotes")
    said = f"{first['msg'][0].lower()}{first['msg'][1:_LONGEST_MESSAGE]}"
    return UsageError(where, f"{place!r}: {said}, not {_shown(first['input'])!r}", see)


def _shown(value: object) -> str:
    """The beginning of a value, which may hold as much as a whole file."""
    try:
        return str(value)[:60]
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
