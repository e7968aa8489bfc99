"""What a merge logs, as words and as figures."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acemerge.engine.execute import OnProgress, Progress
from acemerge.errors import addressed


def event_fields(event: str, **fields: Any) -> dict[str, Any]:
    """What a logged event is, and its figures, for handlers that want more than words."""
    known = {key: addressed(value) if isinstance(value, Path) else value for key, value in fields.items()}
    return {"event": event, "fields": known}


def logged(log: logging.Logger, on_progress: OnProgress) -> OnProgress:
    """The same, and every step is logged, too."""
    if not log.isEnabledFor(logging.DEBUG):
        return on_progress

    def told(now: Progress) -> None:
        message = "%s: %d of %d %s, %s", now.stage, now.done, now.total, now.unit, now.name
        log.debug(*message, extra=event_fields("progress", **asdict(now)))
        on_progress(now)

    return told
