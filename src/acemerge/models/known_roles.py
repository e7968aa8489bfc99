"""Roles that were asked of an architecture before: transformers takes seconds to load, and would say the same again."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from acemerge.checkpoints.header import TensorSpec


def key_of(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], untied: bool, apart: Collection[str]
) -> str | None:
    """A hash of all that roles depend on, versions and our own code included.

    None where that cannot be told: transformers is loaded, and whoever did may have changed it, or it is worked on.
    """
    installed = _installed()
    if installed is None:
        return None
    specs = [(name, str(spec.dtype), spec.shape) for name, spec in sorted(tensors.items())]
    told = json.dumps([installed, config, specs, untied, sorted(apart)], sort_keys=True, default=repr)
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()


@functools.cache
def _installed() -> list[Any] | None:
    if "transformers" in sys.modules:
        return None
    found: list[Any] = []
    for package in ("transformers", "torch"):
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return None
        if "editable" in (distribution.read_text("direct_url.json") or ""):
            return None
        found.append(distribution.version)
    own = sorted(os.scandir(Path(__file__).parent), key=lambda entry: entry.name)
    return [*found, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in own if f.name.endswith(".py")]]
