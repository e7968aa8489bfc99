"""What a run, or a part of one, notes in a store until it is finished: that the place is its own, and what each file
holds that is there.

The claim is an object that says what run it is, and by a word of its own which process. A note lies beside it for each
file, and one for what was found out beside the tensors.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acemerge.checkpoints import objects
from acemerge.checkpoints.hashes import Read
from acemerge.checkpoints.store import Stat
from acemerge.checkpoints.unfinished import JOURNAL
from acemerge.errors import CheckpointError
from acemerge.output.identity import digest
from acemerge.output.journal import MAX_JOURNAL, Done, Step, entries_of, entry_of, read_entry, read_of, spelled, step_of
from acemerge.output.names import WORK

_FINDINGS = ".findings"


@dataclass(frozen=True)
class Notes:
    """Those at one address: the output's, or for a part one of its own within that."""

    home: Path

    # --- the claim ------------------------------------------------------------------------------------------

    def claimed(self) -> bytes | None:
        """The claim as it is; None where there is none, nothing where it cannot be read."""
        try:
            return objects.read_small(self.home / JOURNAL, MAX_JOURNAL)
        except CheckpointError:
            return None if objects.find(self.home / JOURNAL) is None else b""

    def claim(self, identity: Mapping[str, Any], new: bool) -> bytes:
        """Claim the place for this process. FileExistsError where it must be `new` and is not."""
        claim = spelled([{"identity": identity}, {"by": secrets.token_hex(16)}])
        objects.put(self.home / JOURNAL, claim, new)
        return claim

    # --- notes ----------------------------------------------------------------------------------------------

    def note_file(self, run: str, name: str, stat: Stat, steps: Iterable[Step], read: Read) -> None:
        head = {"run": run, "file": name, "stat": [stat.size, stat.etag, stat.version]}
        objects.put(self.home / WORK / name, spelled([head, read_entry(read), *map(entry_of, steps)]))

    def note_findings(self, run: str, findings: Mapping[str, Any], read: Read) -> None:
        objects.put(self.home / WORK / _FINDINGS, spelled([{"run": run}, {"findings": findings}, read_entry(read)]))

    def names(self) -> list[str]:
        """The files that have a note."""
        return [key for key in objects.stats_below(self.home / WORK) if key != _FINDINGS]

    def findings(self) -> Mapping[str, Any]:
        """What was found out beside the tensors, by whatever run."""
        path = self.home / WORK / _FINDINGS
        entries = [] if objects.find(path) is None else entries_of(objects.read_small(path, MAX_JOURNAL))
        return _findings(entries)

    def left(self, claim: bytes, target: Path, names: Collection[str]) -> tuple[Done, dict[str, Stat]] | None:
        """What the run of the `claim` has done of the files of these names, and of those that are still as they were
        uploaded to `target` what they are. None where that is no run.
        """
        entries = entries_of(claim)
        if not entries or "identity" not in entries[0]:
            return None
        about, run = entries[0]["identity"], digest(entries[0]["identity"])
        there: dict[str, Stat] = {}
        noted: list[Mapping[str, Any]] = []
        steps: list[Step | None] = []
        for key in objects.stats_below(self.home / WORK):
            note = entries_of(objects.read_small(self.home / WORK / key, MAX_JOURNAL))
            if not note or note[0].get("run") != run:
                continue
            noted += note
            name = str(note[0].get("file", ""))
            now = objects.find(target / name) if name in names else None
            if now is not None and [now.size, now.etag, now.version] == note[0]["stat"]:
                there[name] = now
                steps += [step_of(entry) for entry in note if "tensor" in entry]
        done = tuple(step for step in steps if step is not None and step.files.keys() <= there.keys())
        kept = {name for step in done for name in step.files}
        left = Done(about, _findings(noted), done, read=read_of(noted))
        return left, {name: stat for name, stat in there.items() if name in kept}

    def forget(self) -> None:
        """Remove the notes, then the claim."""
        for key in objects.stats_below(self.home / WORK):
            objects.delete(self.home / WORK / key)
        objects.delete(self.home / JOURNAL)


def _findings(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for entry in entries for key, value in entry.get("findings", {}).items()}
