"""`--log-format json`: what the library logs, as one JSON object a line on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any


class JsonLines(logging.Formatter):
    """A line for each event: when, how grave, which, in words, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = vars(record)
        return line(fields.get("event", "message"), record.levelname.lower(), record.getMessage(), fields.get("fields"))


def line(event: str, level: str, message: str, fields: Mapping[str, Any] | None = None) -> str:
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, "event": event, "message": message, **(fields or {})}, default=str)


@contextlib.contextmanager
def events_on_stderr() -> Iterator[None]:
    """As long as the block lasts."""
    logger, handler = logging.getLogger("acemerge"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
