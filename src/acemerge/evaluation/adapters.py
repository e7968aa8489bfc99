"""An adapter by itself: merged with its base into a folder that a model can be loaded from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from acemerge.api import merge
from acemerge.checkpoints.hub import locate, parse_id
from acemerge.checkpoints.lora import base_of, is_adapter
from acemerge.errors import UsageError
from acemerge.recipes.labels import expert_labels


def as_model(name: str, base: str | None, scratch: Path, quiet: bool) -> str:
    """The model as it was named; an adapter merged with its base, in a folder under `scratch`.

    The base is `base`, else the Hub id that the adapter's configuration has. A folder that a file names is not opened:
    UsageError says how to name it.
    """
    path = locate(name, allow_pickle=False, quiet=quiet, heads=True).path
    if not is_adapter(path):
        return name
    found = base or base_of(path)
    if found is None or (base is None and parse_id(found) is None):
        what = "is an adapter whose configuration names no base on the Hub"
        raise UsageError(name, what, f"name its base with --base {found or 'BASE'}")
    # Its own name, for heads are found by it.
    out = scratch / hashlib.sha256(f"{found} {name}".encode()).hexdigest()[:12] / expert_labels([name])[0]
    merge(found, [name], method="average", out=out, quiet=quiet)
    return str(out)
