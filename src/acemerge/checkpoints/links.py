"""No link of a folder leads out of it."""

from __future__ import annotations

import re
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.errors import CheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def contained(root: Path, name: str) -> Path:
    """`root / name` with links resolved; CheckpointError when it leaves the folder.

    A Hub cache keeps files as links `snapshots/REV/name -> ../../blobs/HASH`: those blobs belong to the folder, and
    so do those that the models of one cache share, in `blobs` beside `models--ORG--NAME`. A model may lie in a folder
    of its snapshot.
    """
    target = files.resolve(root / name)
    homes = [root]
    snapshot = next((p for p in (root, *root.parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and (snapshot == root or _COMMIT.fullmatch(snapshot.name)):
        homes.append(snapshot.parent.parent / "blobs")
        if snapshot.parent.parent.name.startswith("models--"):
            homes.append(snapshot.parent.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(root / name, "is a link that leaves the folder", "copy the file into the folder")
    return target
