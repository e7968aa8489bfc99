"""What a model or a data set on the Hub is made of: its files with their sizes, before any of them is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import (
    NO_COMMIT,
    REPO_TYPE,
    HubId,
    What,
    download,
    is_commit,
    library,
    manners,
    refusal_of,
    why_not,
)
from acemerge.errors import CheckpointError


@contextlib.contextmanager
def from_cache() -> Iterator[None]:
    """A cure for files in the Hub's cache that are damaged: what lies there is not fetched again."""
    try:
        yield
    except CheckpointError as failure:
        held = files.resolve(Path(failure.where))
        if held.parent.name != "blobs" or "fetch" not in failure.cure or files.kind(held) != "file":
            raise
        as_there = files.sha256(held) == held.name
        cure = "choose a revision that has it whole" if as_there else f"remove {held} and run again, to fetch it anew"
        raise CheckpointError(failure.where, failure.what, cure) from failure


@dataclass(frozen=True)
class CommitFiles:
    """A commit, and the bytes of each file in it; in a folder of the repository, those there by their names there."""

    commit: str
    sizes: Mapping[str, int]


def list_files(wanted: HubId, what: What) -> CommitFiles:
    """Ask the Hub; nothing is fetched. Raises CheckpointError."""
    hub = library()
    ask = hub.HfApi().model_info if what == "model" else hub.HfApi().dataset_info
    try:
        with manners(hub, quiet=True):
            info = ask(wanted.repo, revision=wanted.revision, files_metadata=True)
    except Exception as failure:  # of whichever HTTP library this version of huggingface_hub uses
        refusal = refusal_of(hub, wanted, failure, what)
        raise refusal or CheckpointError(wanted, why_not(hub, failure), "try again with the network") from failure
    if not is_commit(str(info.sha)):
        raise CheckpointError(wanted, *NO_COMMIT)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    return CommitFiles(str(info.sha), {name: sizes[wanted.path_of(name)] for name in wanted.files_of(sizes)})


def is_cached(wanted: HubId, what: What, commit: str, name: str) -> bool:
    """Whether this file of a commit needs no fetching any more."""
    return _cached(wanted, what, commit, name) is not None


def fetch_files(wanted: HubId, what: What, commit: str, names: Sequence[str], quiet: bool) -> Path:
    """Fetch these files of a commit and no others; their folder. Nobody is asked where all are cached.

    Raises CheckpointError.
    """
    held = [_cached(wanted, what, commit, name) for name in names]
    if held and held[0] is not None and None not in held:
        return held[0].parents[len(Path(names[0]).parts) - 1]
    hub = library()
    with manners(hub, quiet):
        return wanted.within(download(hub, wanted, commit, names, what))


def _cached(wanted: HubId, what: What, commit: str, name: str) -> Path | None:
    """Where in the cache this file of a commit is."""
    found = library().try_to_load_from_cache(
        wanted.repo, wanted.path_of(name), revision=commit, repo_type=REPO_TYPE[what]
    )
    return Path(found) if isinstance(found, str) else None
