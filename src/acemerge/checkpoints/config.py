"""`config.json` of a model: bounded in size and depth, and data alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.header import MAX_PARTS, parse_json
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError, fetching

CONFIG = "config.json"
MAX_CONFIG = 16 << 20
_MAX_DEPTH = 64
_AGAIN = fetching("the file again")


def read_config(path: Path) -> Mapping[str, Any]:
    """`config.json` as a table; it is data, and no code that it names is ever loaded."""
    target = contained(path.parent, path.name)
    # transformers itself writes Infinity for some limits.
    text = files.read_small(target, MAX_CONFIG)
    config = parse_json(text, path, _AGAIN, constants=True, parts=MAX_PARTS)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is no JSON object", _AGAIN)
    if not _is_shallow(config):
        raise CheckpointError(path, f"is nested more than {_MAX_DEPTH} levels deep", _AGAIN)
    return config


def _is_shallow(content: Any) -> bool:
    """Whether whoever walks `content` by recursion will come to an end of it."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for items in children for child in items if isinstance(child, dict | list)]
    return not level
