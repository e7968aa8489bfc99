"""Rules of other packages: each is an entry point of the group `acemerge.methods` under the rule's name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from importlib.metadata import EntryPoint

from acemerge.errors import UsageError
from acemerge.methods.base import Method

GROUP = "acemerge.methods"


def installed() -> dict[str, EntryPoint]:
    """What the installed packages offer, by name; nothing is imported."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def load(entry: EntryPoint) -> type[Method]:
    """The rule's class; UsageError, in one line, for whatever the package's code may raise."""
    try:
        found = entry.load()
        is_rule = isinstance(found, type) and dataclasses.is_dataclass(found)
        if not is_rule:
            raise TypeError(f"{type(found).__name__} is no rule")
        rule: type[Method] = found
        if rule.name != entry.name:
            raise TypeError(f"its rule is named {rule.name!r}")
    except Exception as failure:
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
        what = f"package {package} does not load it ({reason})"
        raise UsageError(f"method {entry.name!r}", what, "mend it or remove the package") from failure
    return rule
