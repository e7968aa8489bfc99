"""What is only known of a merge when all was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acemerge.inspection.advice import of_frozen
from acemerge.output.length import Length, length_of, length_of_tokens, length_warning, tokens_warning
from acemerge.output.records import records_of
from acemerge.output.shares import energies_of, total_energies


def how_far(manifest: Mapping[str, Any]) -> tuple[Length | None, list[str]]:
    """How far the merge goes, and what is to be warned of: that it goes too far, and experts that are the base."""
    labels, records = manifest["experts"], records_of(manifest)
    compared = any(energies_of(record, labels) for record in records.values())
    found = [str(advice) for advice in of_frozen(labels, total_energies(labels, records))] if compared else []
    length = length_of(labels, records)
    if length is not None and length.overshoots and len(labels) > 1:
        found.append(length_warning(length, manifest["recipe"]))
    tokens = length_of_tokens(labels, records)
    if tokens is not None and tokens.overshoots and len(labels) > 1:
        found.append(tokens_warning(tokens, manifest["recipe"]))
    return length, found
