"""What experts are called: in messages, in the manifest, and as the names of their files of heads."""

from __future__ import annotations

import re
from collections.abc import Sequence


def expert_labels(paths: Sequence[str]) -> list[str]:
    """A short name for each expert, used for its heads' file: the folder's name, numbered where two agree."""
    folders = [path.rstrip("/").split("/")[-1] for path in paths]
    names = [re.sub(r"[^\w.-]", "-", folder, flags=re.ASCII).strip(".")[-100:] or "expert" for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names, 1)]
