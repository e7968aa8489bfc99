"""Where a page stands that mkdocs.yml does not name."""

from __future__ import annotations

from typing import Any

OTHERS = "More"  # the last section


def complete(nav: list[Any], rules: list[str], pages: list[str]) -> list[Any]:
    """The navigation with all rules in the place of their list, and the pages that it does not name at its end."""
    filled = [{title: rules if entry == rules[0] else entry for title, entry in item.items()} for item in nav]
    named = set(_paths(filled))
    rest = sorted(path for path in pages if path not in named)
    return [*filled, {OTHERS: rest}] if rest else filled


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in _paths(entry)]
