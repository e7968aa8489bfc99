"""transformers, used without a word and without asking anybody."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from acemerge.errors import UsageError


def need_transformers() -> Any:
    """The library; UsageError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise UsageError("transformers", "is not installed", "pip install 'acemerge[hf]'") from None


@contextlib.contextmanager
def quiet_transformers(offline: bool = False) -> Iterator[Any]:
    """The library, silent and without progress bars while the block lasts: what matters is said by us.

    With `offline` the Hub is not asked meanwhile, whatever a configuration names.
    """
    transformers = need_transformers()
    hub: Any = importlib.import_module("huggingface_hub.constants")
    logger, bars = logging.getLogger("transformers"), transformers.utils.logging
    level, with_bars, was_offline = logger.level, bars.is_progress_bar_enabled(), hub.HF_HUB_OFFLINE
    logger.setLevel(logging.CRITICAL)
    bars.disable_progress_bar()
    hub.HF_HUB_OFFLINE = offline or was_offline
    try:
        yield transformers
    finally:
        logger.setLevel(level)
        hub.HF_HUB_OFFLINE = was_offline
        if with_bars:
            bars.enable_progress_bar()
