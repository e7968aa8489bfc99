"""Scores that are kept as soon as they are made, so that a run that was broken off goes on behind the last one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from acemerge.checkpoints import files
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.errors import AcemergeError
from acemerge.evaluation.evaluate import Run, ScoreTask, score_task
from acemerge.evaluation.tables import Score
from acemerge.output.manifest import versions
from acemerge.output.writer import write_file
from acemerge.tasks.networks import Model
from acemerge.tasks.task_file import AnyTask

_MOST = 64 << 20


def kept_in(folder: Path, score: ScoreTask = score_task) -> ScoreTask:
    """`score`, but what the folder has of the same model, task and versions is taken from there."""

    def kept(model: Model, task: AnyTask, run: Run, row: str) -> Score:
        asked = {
            "model": _identity(model),
            "task": task.model_dump(mode="json"),
            "bootstrap": [run.tasks.resamples, run.tasks.seed],
            "device": str(run.device),
            "versions": versions(),
        }
        path = folder / f"{hashlib.sha256(f'{row} {task.name}'.encode()).hexdigest()[:16]}.json"
        found = _read(path, asked)
        if found is None:
            found = score(model, task, run, row)
            write_file(path, _spelled(asked, found))
        return found

    return kept


def _identity(model: Model) -> str:
    """Of a merged model the hash of its manifest, which holds those of its weights; else its id with the commit."""
    manifest = model.path / MANIFEST
    return files.sha256(manifest) if files.kind(manifest) == "file" else model.name


def _spelled(asked: dict[str, Any], score: Score) -> bytes:
    content = {**vars(score), "draws": score.draws.tolist(), "metrics": dict(score.metrics)}
    return json.dumps({"asked": asked, "score": content}).encode()


def _read(path: Path, asked: dict[str, Any]) -> Score | None:
    """The score in a file, None where there is none, of something else, or not whole."""
    try:
        if files.kind(path) != "file":
            return None
        content = json.loads(files.read_small(path, _MOST))
        if content["asked"] != asked:
            return None
        return Score(**{**content["score"], "draws": np.array(content["score"]["draws"])})
    except (AcemergeError, ValueError, KeyError, TypeError):
        return None
