"""A data set of the Hub, by `datasets`: of its own repository's files and no others, whatever its card names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import HubId
from acemerge.checkpoints.hub_files import fetch_files, list_files
from acemerge.checkpoints.yaml_text import YamlError, parse_yaml
from acemerge.errors import CheckpointError, UsageError

_MAX_CARD = 4 << 20
_CARD, _CONFIGURATION = "README.md", ".huggingface.yaml"  # `datasets` takes `configs` from both
_BLOCK = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---[ \t]*(?:[\r\n]|\Z)", re.DOTALL)
_OF_FILES = ("data_files", "data_dir")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|.*::|[/\\~]|(.*[/\\])?\.\.([/\\]|\Z)", re.IGNORECASE | re.DOTALL)
_CURE = "use another data set, or fetch its files and name them"


def load(datasets: Any, wanted: HubId, subset: str | None, split: str) -> Any:
    """The split, as an Arrow table. Where the Hub cannot be asked, of what `datasets` has loaded before."""
    try:
        listing = list_files(wanted, "data set")
    except CheckpointError as failure:
        with _offline(datasets):
            try:
                return _of_builder(datasets, wanted, subset, split)
            except Exception:
                raise UsageError(wanted, failure.what, failure.cure) from failure
    names = [name for name in (_CARD, _CONFIGURATION) if name in listing.sizes]
    if names:
        root = fetch_files(wanted, "data set", listing.commit, names, quiet=True)
        for name in names:
            text = files.read_small(files.resolve(root / name), _MAX_CARD).decode("utf-8", errors="replace")
            check_configuration(text, name == _CARD, f"{wanted}: {name}")
    return _of_builder(datasets, replace(wanted, revision=listing.commit), subset, split)


def check_configuration(text: str, is_card: bool, where: str) -> None:
    """UsageError where a card's own list of data has a path or an address that is not in its repository."""
    block = _BLOCK.match(text.lstrip("\ufeff")) if is_card else None
    if is_card and block is None:
        return
    try:
        content = parse_yaml(block[1] if block else text)
    except YamlError as failure:
        raise UsageError(where, f"cannot be read ({failure})", _CURE) from None
    configs: Any = content.get("configs") if isinstance(content, dict) else None
    for config in configs if isinstance(configs, list) else [configs]:
        if isinstance(config, dict):
            for name in _texts([config.get(key) for key in _OF_FILES]):
                _check_inside(name, where)


def _of_builder(datasets: Any, wanted: HubId, subset: str | None, split: str) -> Any:
    builder = datasets.load_dataset_builder(wanted.repo, subset, revision=wanted.revision)
    for name in _texts(dict(builder.config.data_files or {})):
        inside = name.removeprefix(f"hf://datasets/{wanted.repo}@")
        _check_inside(inside if inside != name else f"/{name}", str(wanted))
    builder.download_and_prepare()
    return builder.as_dataset(split=split).with_format("arrow")[:]


def _check_inside(name: str, where: str) -> None:
    if _ELSEWHERE.match(name):
        raise UsageError(where, f"has its data in {name[:80]!r}, which is not in its repository", _CURE)


def _texts(value: Any) -> Iterator[str]:
    """Every text in what a card says of files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """`datasets` asks nobody: what it would be told was not looked at."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
