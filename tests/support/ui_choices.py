"""What a user of the page picks."""

from __future__ import annotations

from typing import Any

from acemerge.ui.choice import Choice


def picked(*experts: str, **more: Any) -> Choice:
    return Choice("./models/base", [f"./models/{name}" for name in experts], **more)
