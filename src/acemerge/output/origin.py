"""What a model card says of the models that were merged: where they are on the Hub, and their licence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import hub_id
from acemerge.checkpoints.yaml_text import parse_yaml
from acemerge.errors import AcemergeError
from acemerge.output.names import CARD

_NAME = re.compile(r"[\w.+-]{1,100}", re.ASCII)  # of a licence, as the Hub has them
_MOST = 1 << 20  # bytes of a card that is looked at


@dataclass(frozen=True)
class Origin:
    """A model's repository and licence, None where it has none that is known."""

    repo: str | None = None
    license: str | None = None


def origin_of(model: str, folder: Path) -> Origin:
    """Of a model as the recipe names it, in its folder; the licence as the metadata of its own card has it."""
    found = hub_id(model)
    return Origin(None if found is None else found.repo, _license(folder / CARD))


def common_license(origins: Sequence[Origin]) -> str | None:
    """The licence if all have the same; `other` says nothing without its text."""
    licenses = {origin.license for origin in origins}
    return licenses.pop() if len(licenses) == 1 and licenses != {"other"} else None


def _license(card: Path) -> str | None:
    try:
        text = files.read_small(card, _MOST).decode() if files.kind(card) == "file" else ""
    except (AcemergeError, UnicodeDecodeError):
        return None
    fence, _, rest = text.partition("\n")
    block, end, _ = rest.partition("\n---")
    if fence.strip() != "---" or not end:
        return None
    try:
        metadata = parse_yaml(block)
    except ValueError:
        return None
    found = metadata.get("license") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) and _NAME.fullmatch(found) else None
