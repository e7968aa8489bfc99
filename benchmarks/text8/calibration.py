"""What rules that want data are given: a few of the examples that each expert was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import Task, build, read

EXAMPLES = 256  # of a task


def calibration_file(folders: Mapping[Task, Path], base: Path, cache: Path, to: Path) -> Path:
    """A task file for `--calibration`. Experts read with the base's tokenizer, which is put beside them."""
    for folder in folders.values():
        for file in base.glob("*token*.json"):
            shutil.copy(file, folder)
    to.write_text(json.dumps({"tasks": [_asked(task, build(task, cache)) for task in folders]}))
    return to


def _asked(task: Task, data: Path) -> dict[str, Any]:
    pairs = "text_pair" in read(data, "train")[0]
    return {
        "name": task.name,
        "kind": "classification",
        "data": str(data / "train.jsonl"),
        "text": ["text", "text_pair"] if pairs else "text",
        "label": "label",
        "labels": json.loads((data / "labels.json").read_text()),
        "limit": EXAMPLES,
        "pooling": "mean",
        "max_length": task.tokens,
    }
