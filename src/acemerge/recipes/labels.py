"""What experts are called: in messages, in the manifest, and as the names of their files of heads."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What Windows takes for a device, whatever the ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def expert_labels(paths: Sequence[str]) -> list[str]:
    """A short name for each expert, used for its heads' file: the folder's name, numbered where two agree.

    Two that differ in case alone agree, for on many systems their files do. A name that Windows has no file of is
    numbered too.
    """
    folders = [path.rstrip("/").split("/")[-1] for path in paths]
    names = [re.sub(r"[^\w.-]", "-", folder, flags=re.ASCII).strip(".")[-100:] or "expert" for folder in folders]
    if len({name.lower() for name in names}) == len(names) and not any(map(_DEVICES.match, names)):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names, 1)]
