"""How long a run will take on this machine, as far as a moment tells."""

from __future__ import annotations

from pathlib import Path

import torch

from acemerge.checkpoints import machine
from acemerge.checkpoints.pace import FilePace, seconds_to_read, seconds_to_write
from acemerge.engine.opening import Opened
from acemerge.planning.estimate import measure_rates, plan_seconds
from acemerge.planning.jobs import Plan


def expected_seconds(opened: Opened, plan: Plan, out: Path) -> float:
    """Of the opened checkpoints' plan, or of a part of it, into this output.

    What stores and their network take is not known and not counted.
    """
    sizes = {path: found[0] for model in opened.models for path, found in model.fingerprints.items()}
    reading, copying = seconds_to_read(list(sizes))
    again = 0.0 if machine.stays_cached(sum(sizes.values())) else reading
    pace = FilePace(reading, again, seconds_to_write(out), copying / torch.get_num_threads())
    return plan_seconds(plan, measure_rates(opened.devices[0]), pace)
