"""What the tests of the page share."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import PlainModel, write_checkpoint

from acemerge.ui.folders import Folders


@pytest.fixture
def shelf(plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The folder `models` with a base and three experts, and `outside` beside it."""
    monkeypatch.chdir(plain.root)
    plain.root = plain.root / "models"
    plain.save()
    write_checkpoint(Path("outside"), plain.base)
    return Folders([Path("models")])
