"""A commit of a model on the Hub, read by ranges: nothing of it is kept on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from acemerge.checkpoints.store import Listing, Stat, StoreFailure

_ANSWER = 120.0  # seconds


class HubStore:
    """Of the files of one commit, which never changes, those that are shown; `client` is huggingface_hub."""

    def __init__(self, client: Any, repo: str, commit: str) -> None:
        self._client, self._repo, self._commit = client, repo, commit
        self._files: dict[str, Stat] | None = None
        self._shown: set[str] = set()

    def show(self, keys: Iterable[str]) -> None:
        """These are of a model that is wanted: a repository may hold much beside it."""
        self._shown |= set(keys)

    def stat(self, key: str) -> Stat:
        found = self._all().get(key)
        if found is None:
            raise StoreFailure("missing", "missing")
        return found

    def listing(self, prefix: str) -> Listing:
        start = f"{prefix}/" if prefix else ""
        shown = {key: stat for key, stat in self._all().items() if key in self._shown and key.startswith(start)}
        inside = {key.removeprefix(start): stat for key, stat in shown.items()}
        folders = dict.fromkeys(name.partition("/")[0] for name in inside if "/" in name)
        return Listing({name: stat for name, stat in inside.items() if "/" not in name}, tuple(folders))

    def read(self, key: str, start: int, end: int, expected: Stat) -> bytes:
        url = self._client.hf_hub_url(self._repo, key, revision=self._commit)
        headers = self._client.utils.build_hf_headers() | {
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            answer = self._client.utils.get_session().get(url, headers=headers, timeout=_ANSWER)
        except Exception as failure:  # of whichever HTTP library this version of huggingface_hub uses
            raise self._silent(failure) from None
        if answer.status_code in (401, 403):
            gated = answer.headers.get("X-Error-Code") == "GatedRepo"
            refused = f"the Hub refuses access ({answer.status_code}): set HF_TOKEN to a token that may read it"
            raise StoreFailure("refused", "it is gated: accept its terms, and set HF_TOKEN" if gated else refused)
        if answer.status_code == 404:
            raise StoreFailure("missing", "missing")
        content = bytes(answer.content)
        if answer.status_code == 200 and len(content) == expected.size:  # a server without ranges
            return content[start:end]
        if answer.status_code != 206:
            raise StoreFailure("passing", f"the Hub answers {answer.status_code}")
        return content

    def put(self, key: str, data: bytes, new: bool = False) -> Stat:
        raise StoreFailure("refused", "the Hub is written to by --push alone")

    def upload(self, key: str, file: Path) -> Stat:
        raise StoreFailure("refused", "the Hub is written to by --push alone")

    def delete(self, key: str) -> None:
        raise StoreFailure("refused", "the Hub is written to by --push alone")

    def _silent(self, failure: Exception) -> StoreFailure:
        if isinstance(failure, self._client.errors.OfflineModeIsEnabled):
            return StoreFailure("refused", "HF_HUB_OFFLINE is set: unset it to read by ranges")
        return StoreFailure("passing", f"the Hub does not answer ({type(failure).__name__})")

    def _all(self) -> dict[str, Stat]:
        if self._files is None:
            try:
                info = self._client.HfApi().model_info(self._repo, revision=self._commit, files_metadata=True)
            except Exception as failure:
                raise self._silent(failure) from None
            self._files = {file.rfilename: _stat(file) for file in info.siblings or ()}
        return self._files


def _stat(file: Any) -> Stat:
    large = getattr(file, "lfs", None)
    return Stat(int(file.size or 0), str((large and large.sha256) or file.blob_id or ""))
