"""What a merge gives back beside the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acemerge.output.records import TensorRecord, records_of


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What a merge did. `manifest` is the table that `acemerge.json` holds; `out` is None where nothing was written.

    `pushed` is the address on the Hub where it was uploaded. `was_complete`: with `resume`, the output was there
    already and was verified. `part`: that was all that was done, and `manifest` is of its tensors and files alone.
    """

    out: Path | None
    manifest: Mapping[str, Any]
    pushed: str | None = None
    was_complete: bool = False
    part: str | None = None

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """For every tensor: role, rule, reason, status and the rule's own numbers."""
        tensors: Mapping[str, Mapping[str, Any]] = self.manifest["tensors"]
        return tensors

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """The same, as records."""
        return records_of(self.manifest)

    @property
    def rules(self) -> dict[str, int]:
        """How many tensors each rule merged, the most first."""
        return dict(Counter(f"{record['rule']}" for record in self.tensors.values()).most_common())

    @property
    def bytes_written(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["outputs"].values())

    def __repr__(self) -> str:
        """Five lines: for whoever looks at it in a notebook."""
        rules = ", ".join(f"{count} by {rule}" for rule, count in self.rules.items())
        lines = [
            f"MergeReport of {self.out or 'a merge that was not written'}",
            f"  experts: {', '.join(self.manifest['experts'])}",
            f"  tensors: {len(self.tensors)} ({rules})",
            f"  written: {self.bytes_written:,} bytes in {self.manifest['seconds']:.1f} s",
            f"  warnings: {len(self.manifest['warnings']) or 'none'}",
        ]
        return "\n".join(lines)
