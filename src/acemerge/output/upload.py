"""A finished output folder to the Hub, in one commit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from acemerge.checkpoints.hub import in_words, library, manners, parse_id
from acemerge.errors import UsageError, WriteError
from acemerge.output.names import is_output


def check_push(repo: str) -> None:
    """UsageError when it is plain before the work that nothing could be uploaded to `repo` after it."""
    wanted = parse_id(repo)
    if wanted is None or str(wanted) != wanted.repo:
        raise UsageError(f"--push {repo}", "not of the form org/name", "name a repository, without a revision")
    hub = library()
    if hub.constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push {repo}", "HF_HUB_OFFLINE is set", "unset it, or leave --push out")
    if hub.get_token() is None:
        raise UsageError(f"--push {repo}", "there is no token", "set HF_TOKEN to one that may write there")


def upload(folder: Path, names: Iterable[str], repo: str, quiet: bool, finish: bool = False) -> str:
    """Upload these files of `folder` to a repository, made private if it is new, and return its address.

    All in one commit, which also removes what an earlier output had there and this one has not. Raises WriteError;
    where it was the `finish` of parts, of which nothing is left to be put together, its cure says so.
    """
    hub = library()
    try:
        with manners(hub, quiet):
            return _commit(hub, folder, list(names), repo)
    except Exception as failure:  # of whichever HTTP library this version of huggingface_hub uses
        again = f"with --resume{' in the place of --finish' if finish else ''}, which only uploads it"
        cure = f"the output is complete at {folder}: run the same command again {again}"
        raise WriteError(f"--push {repo}", _reason(hub, failure), cure) from failure


def _commit(hub: Any, folder: Path, names: list[str], repo: str) -> str:
    api = hub.HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    stale = [name for name in api.list_repo_files(repo) if is_output(name) and name not in names]
    changes = [hub.CommitOperationAdd(name, str(folder / name)) for name in names]
    changes += [hub.CommitOperationDelete(name, is_folder=False) for name in stale]
    api.create_commit(repo, changes, commit_message="Upload a model made with acemerge")
    return f"{hub.constants.ENDPOINT}/{repo}"


def _reason(hub: Any, failure: Exception) -> str:
    if isinstance(failure, hub.errors.HfHubHTTPError) and failure.response.status_code in (401, 403):
        status = failure.response.status_code
        return f"the Hub refuses access ({status}): HF_TOKEN must be a token that may write there"
    return f"the upload failed ({in_words(failure)})"
