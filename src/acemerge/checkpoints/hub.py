"""Models by their Hub id: only the files that a merge reads are fetched, into huggingface_hub's own cache."""

from __future__ import annotations

import contextlib
import errno
import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from acemerge.checkpoints import files
from acemerge.checkpoints.address import HUB, parse, place_of, scheme_of
from acemerge.checkpoints.assets import is_head, with_asset_folders
from acemerge.checkpoints.config import CONFIG
from acemerge.checkpoints.nearby import almost
from acemerge.checkpoints.objects import hub_store
from acemerge.checkpoints.weight_files import CONVERT, listed_files, needed_files
from acemerge.errors import CheckpointError, UsageError, WriteError, addressed

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?(?::(?P<folder>{_PART}(?:/{_PART})*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 300
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
What = Literal["model", "data set"]
REPO_TYPE: Mapping[What, str] = {"model": "model", "data set": "dataset"}
NO_COMMIT = ("the Hub's answer names no commit", "check HF_ENDPOINT, if it is set")


@dataclass(frozen=True)
class HubId:
    """`org/name`, or `org/name@revision`: a branch, a tag or a commit; `:folder` behind it says where the model is."""

    repo: str
    revision: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}{'' if self.folder is None else f':{self.folder}'}"

    def path_of(self, name: str) -> str:
        """Where in the repository a file of the model is."""
        return name if self.folder is None else f"{self.folder}/{name}"

    def within(self, snapshot: Path) -> Path:
        """The model's folder in that of the repository's commit."""
        return snapshot if self.folder is None else snapshot / self.folder

    def files_of(self, names: Iterable[str]) -> list[str]:
        """Of the files of the repository those in the model's folder, by their names there, sorted."""
        prefix = self.path_of("")
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


@dataclass(frozen=True)
class Located:
    """The folder of a model; `origin` tells it from every other, with its commit if it is from the Hub."""

    path: Path
    origin: str
    name: str


def parse_id(text: str) -> HubId | None:
    """The Hub id of exactly this form, if it is one."""
    found = _ID.fullmatch(text) if len(text) <= _LONGEST and ".." not in text else None
    if found is None or "--" in found["repo"] or found["repo"].endswith(".git"):
        return None
    return HubId(found["repo"], found["revision"], found["folder"])


def hub_id(model: str, beside: Path = Path()) -> HubId | None:
    """The Hub id that a model is given by, also as `hf://org/name@revision/folder`; None for a path, and for another
    address. What exists in the folder `beside` is a path.
    """
    address = parse(model)
    if address is not None:
        return _of_address(address)
    wanted = parse_id(model)
    return None if wanted is None or files.kind(beside / model) != "nothing" else wanted


def _of_address(address: Path) -> HubId | None:
    if scheme_of(address) != HUB:
        return None
    place = place_of(address)
    found = parse_id(f"{place.bucket}:{place.key}" if place.key else place.bucket)
    if found is None:
        raise UsageError(address, "names no model of the Hub", "write hf://org/name, or hf://org/name@revision/folder")
    return found


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which never changes."""
    return _COMMIT.fullmatch(revision) is not None


def locate(model: str, allow_pickle: bool, quiet: bool, heads: bool = False, stream: bool = False) -> Located:
    """The folder of a model given by its path, its address or its Hub id; what of the last is not cached yet is
    fetched, or with `stream` left where it is: its address is the folder then.

    With `heads` also the task heads that lie beside a merged model. Without `quiet`, a download shows its progress on
    a terminal. Raises CheckpointError.
    """
    wanted = hub_id(model)
    if wanted is None:
        path = parse(model) or Path(model)
        return Located(path, addressed(path), addressed(model))
    hub = library()
    try:
        with manners(hub, quiet):
            root, commit = (_stream if stream else _fetch)(hub, wanted, _Wanted(allow_pickle, heads))
    except CheckpointError as failure:
        raise _path_first(model, failure) from failure
    origin = replace(wanted, revision=commit)
    return Located(wanted.within(root), str(origin), str(replace(wanted, revision=None)))


def _path_first(model: str, failure: CheckpointError) -> CheckpointError:
    """The failure to find a model on the Hub, where it may have been meant as a path."""
    if parse(model) is not None:  # it was meant as an address
        return failure
    path, meant = Path(model), almost(Path(model))
    if not meant and files.kind(files.resolve(path.parent)) != "folder":
        return failure
    what = f"no such folder, and {failure.what.removeprefix('no such folder here, and ')}"
    return CheckpointError(failure.where, what, f"{meant} Else {failure.cure}" if meant else failure.cure)


def locate_cached(model: str) -> Path:
    """The folder of a model given by its path, or by its Hub id as far as that is cached: nobody is asked.

    Raises CheckpointError.
    """
    wanted = hub_id(model)
    if wanted is None:
        return parse(model) or Path(model)
    hub = library()
    with manners(hub, quiet=True):
        root = _cached(hub, wanted, _Wanted(allow_pickle=False, heads=False), "nothing is fetched to look back")
    return wanted.within(root)


def library() -> Any:
    """huggingface_hub, imported where it is used. UsageError when it is not installed."""
    try:
        for part in ("errors", "constants", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
        return importlib.import_module("huggingface_hub")
    except ImportError:
        what = "huggingface_hub is not installed, which reads and writes the Hub"
        raise UsageError("Hub", what, "pip install 'acemerge[hub]', or name a local folder") from None


@dataclass(frozen=True)
class _Wanted:
    """Which files of a model are."""

    allow_pickle: bool
    heads: bool

    def of(self, wanted: HubId, names: Sequence[str]) -> list[str]:
        """Of the files in the model's folder. CheckpointError where they are no model."""
        heads = [name for name in names if self.heads and is_head(name)]
        return [*needed_files(wanted, names, self.allow_pickle), *heads]


def _fetch(hub: Any, wanted: HubId, which: _Wanted) -> tuple[Path, str]:
    """The cached folder of a repository's commit, with all that a merge needs of the model in it, and the commit."""
    info = _ask(hub, wanted, which)
    if isinstance(info, Path):
        return info, info.name
    needed = which.of(wanted, wanted.files_of(file.rfilename for file in info.siblings or ()))
    root = download(hub, wanted, wanted.revision, needed)
    if root.name != info.sha:
        raise CheckpointError(wanted, "moved to another commit while it was fetched", "run again")
    _complete(wanted, root, needed, "")
    shards = [shard for name in needed for shard in listed_files(wanted.within(root), name)]
    _check_listed(wanted, shards, info)
    if shards:
        download(hub, wanted, info.sha, shards)
    return _complete(wanted, root, shards, ""), root.name


def _stream(hub: Any, wanted: HubId, which: _Wanted) -> tuple[Path, str]:
    """The address of a repository's commit, and the commit; its folder where all that is needed is cached."""
    info = _ask(hub, wanted, which)
    if isinstance(info, Path):
        return info, info.name
    needed = which.of(wanted, wanted.files_of(file.rfilename for file in info.siblings or ()))
    with contextlib.suppress(CheckpointError):
        return _cached(hub, replace(wanted, revision=info.sha), which, ""), info.sha
    address = Path(f"{HUB}:/{wanted.repo}@{info.sha}")
    store = hub_store(address)
    store.show(map(wanted.path_of, needed))
    shards = [shard for name in needed for shard in listed_files(wanted.within(address), name)]
    _check_listed(wanted, shards, info)
    store.show(map(wanted.path_of, shards))
    return address, info.sha


def _check_listed(wanted: HubId, shards: Sequence[str], info: Any) -> None:
    """CheckpointError for an index that lists what the repository has not: fetching again does not help."""
    there = {file.rfilename for file in info.siblings or ()}
    lost = next((shard for shard in shards if wanted.path_of(shard) not in there), None)
    if lost is not None:
        raise CheckpointError(wanted, f"its index lists {lost}, which is not there", "choose a revision that has it")


def _ask(hub: Any, wanted: HubId, which: _Wanted) -> Any:
    """What the Hub says of the repository; the cached folder where it need not be asked, or cannot."""
    if wanted.revision and is_commit(wanted.revision):  # what a commit holds never changes: ask nobody
        with contextlib.suppress(CheckpointError):
            return _cached(hub, wanted, which, "")
    try:
        info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision)
    except Exception as failure:  # of whichever HTTP library this version of huggingface_hub uses
        refusal = refusal_of(hub, wanted, failure)
        if refusal is not None:
            raise refusal from failure
        return _cached(hub, wanted, which, why_not(hub, failure))
    if not is_commit(str(info.sha)):
        raise CheckpointError(wanted, *NO_COMMIT)
    return info


def download(hub: Any, wanted: HubId, revision: str | None, names: Sequence[str], what: What = "model") -> Path:
    """Fetch these files of a model or data set and no others; the folder of the repository's commit."""
    patterns = [wanted.path_of(name) for name in names]
    try:
        root = hub.snapshot_download(wanted.repo, revision=revision, allow_patterns=patterns, repo_type=REPO_TYPE[what])
    except Exception as failure:
        if isinstance(failure, OSError) and failure.errno in _NO_ROOM:
            kept = f"cannot keep what is fetched ({failure.strerror})"
            cure = "free space, or set HF_HUB_CACHE to another folder, then run again"
            raise WriteError(hub.constants.HF_HUB_CACHE, kept, cure) from failure
        refusal = refusal_of(hub, wanted, failure, what)
        lesser = isinstance(failure, hub.errors.LocalEntryNotFoundError) and failure.__cause__ is not None
        how = f"could not be fetched ({in_words((failure.__cause__ if lesser else None) or failure)})"
        raise refusal or CheckpointError(wanted, how, "run again: what was fetched is kept") from failure
    return Path(root)


def _cached(hub: Any, wanted: HubId, which: _Wanted, why: str) -> Path:
    """The folder of what was fetched before; CheckpointError when it is not all there."""
    try:
        found = hub.snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=[wanted.path_of(CONFIG)], local_files_only=True
        )
    except Exception as failure:
        raise _missing(wanted, "is not in the cache", why) from failure
    root = Path(found)
    needed = _needed_offline(hub, wanted, root, which, why)
    _complete(wanted, root, needed, why)
    folder = wanted.within(root)
    return _complete(wanted, root, [shard for name in needed for shard in listed_files(folder, name)], why)


def _needed_offline(hub: Any, wanted: HubId, root: Path, which: _Wanted, why: str) -> list[str]:
    """The files that a merge needs, of the commit's list where the cache has it, else of those that it holds."""
    with contextlib.suppress(Exception):  # this version of huggingface_hub keeps no such list, or none of this commit
        tree = hub.get_cached_repo_tree(wanted.repo, revision=root.name)
        return which.of(wanted, wanted.files_of(file.path for file in tree))
    folder = wanted.within(root)
    try:
        return which.of(wanted, with_asset_folders(folder, files.list_folder(folder)))
    except CheckpointError as failure:
        also = "add --allow-pickle to read it as plain data, " if failure.cure == CONVERT else ""
        raise _missing(wanted, f"{failure.what} (in the cache)", why, also) from None


def _complete(wanted: HubId, root: Path, names: Sequence[str], why: str) -> Path:
    for name in names:
        if files.kind(files.resolve(root / wanted.path_of(name))) != "file":
            raise _missing(wanted, f"is in the cache without {name}", why)
    return root


def _missing(wanted: HubId, what: str, why: str, also: str = "") -> CheckpointError:
    cure = f"{also}fetch it once with the network, or name a local folder"
    return CheckpointError(wanted, f"{what}, and {why or 'it was not fetched'}", cure)


def refusal_of(hub: Any, wanted: HubId, failure: Exception, what: What = "model") -> CheckpointError | None:
    """What the Hub's answer means; None when there was no answer, or none that is about the model or data set."""
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{'datasets/' if what == 'data set' else ''}{wanted.repo}"
    if isinstance(failure, errors.LocalEntryNotFoundError) and isinstance(failure.__cause__, Exception):
        failure = failure.__cause__  # the file is not cached either, which is the lesser news
    if isinstance(failure, errors.GatedRepoError):
        return CheckpointError(wanted, "is gated", f"accept its terms at {page} and set HF_TOKEN")
    if isinstance(failure, errors.RepositoryNotFoundError):
        found = f"no such folder here, and no such {what} on the Hub that you may see"
        return CheckpointError(wanted, found, f"check the name, and set HF_TOKEN for a private or gated {what}")
    if isinstance(failure, errors.RevisionNotFoundError):
        return CheckpointError(wanted, "has no such revision", f"name a branch, tag or commit of {page}")
    status = failure.response.status_code if isinstance(failure, errors.HfHubHTTPError) else 0
    if status in (401, 403):
        return CheckpointError(wanted, f"the Hub refuses access ({status})", "set HF_TOKEN to a token that may read it")
    return None


def why_not(hub: Any, failure: Exception) -> str:
    if isinstance(failure, hub.errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"the Hub cannot be reached ({in_words(failure)})"


def in_words(failure: BaseException) -> str:
    return " ".join(str(failure).split())[:160] or type(failure).__name__


@contextlib.contextmanager
def manners(hub: Any, quiet: bool) -> Iterator[None]:
    """huggingface_hub's own bars and messages on a terminal, unless quiet; neither elsewhere."""
    silent = quiet or not sys.stderr.isatty()
    shown, level = not hub.utils.are_progress_bars_disabled(), hub.utils.logging.get_verbosity()
    if silent:
        hub.utils.logging.set_verbosity_error()
        hub.utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are to whoever writes code with it
            yield
    finally:
        hub.utils.logging.set_verbosity(level)
        if silent and shown:
            hub.utils.enable_progress_bars()
