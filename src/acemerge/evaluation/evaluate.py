"""Evaluates models on tasks: each example through the network once, the metrics, and their bootstrap."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.errors import UsageError
from acemerge.evaluation.adapters import as_model
from acemerge.evaluation.harness import score_by_harness
from acemerge.evaluation.metrics import METRICS, bootstrap
from acemerge.evaluation.tables import EXPERTS, Evaluation, Row, Score
from acemerge.linalg.device import with_host
from acemerge.models.quiet import quiet_transformers
from acemerge.tasks.examples import open_examples, open_text
from acemerge.tasks.heads import find_heads
from acemerge.tasks.networks import Model, open_model
from acemerge.tasks.perplexity import text_losses
from acemerge.tasks.predict import OnBatch, score
from acemerge.tasks.task_file import AnyTask, Classification, Images, LmEval, Perplexity, Regression, Tasks, ZeroShot

# Told of the row and task, and how much of it is done, of how much.
OnTaskProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """What all evaluations of one run share; `base` is what adapters come from, if they do not say."""

    tasks: Tasks
    device: torch.device
    on_progress: OnTaskProgress = lambda *_: None
    quiet: bool = True
    base: str | None = None
    opened: dict[str, Model] = field(default_factory=dict, repr=False)

    def model(self, name: str) -> Model:
        """A model by its folder or Hub id, looked up once."""
        if name not in self.opened:
            whole = as_model(name, self.base, self.scratch, self.quiet)
            self.opened[name] = open_model(whole, self.device, self.quiet)
        return self.opened[name]

    @cached_property
    def scratch(self) -> Path:
        """Where adapters are merged with their base: away with the run."""
        return Path(self._scratch.name)

    @cached_property
    def _scratch(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="acemerge-")

    def seed(self, task: AnyTask) -> list[int]:
        """The same rows are drawn for every model on one task, others on another."""
        return [self.tasks.seed, zlib.crc32(task.name.encode())]


ScoreTask = Callable[[Model, AnyTask, Run, str], Score]


def evaluate(models: Mapping[str, str], run: Run, score: ScoreTask | None = None) -> Evaluation:
    """Each named model on every task, after the experts, each on its own task. `score` is `score_task` by default."""
    score = score or score_task
    tasks = run.tasks.tasks
    opened = {name: run.model(path) for name, path in models.items()}  # a wrong name is found before the first score
    experts = {task.name: run.model(task.expert) for task in tasks if task.expert}
    if EXPERTS in opened:
        raise UsageError(EXPERTS, "is the name of the experts' own row", "give the model's folder another name")
    rows = []
    if experts:
        own = (score(experts[t.name], t, run, EXPERTS) if t.name in experts else None for t in tasks)
        rows.append(Row(EXPERTS, tuple(own)))
    rows += rows_of(opened, run, score)
    return Evaluation(tuple(task.name for task in tasks), tuple(rows))


def rows_of(models: Mapping[str, Model], run: Run, score: ScoreTask | None = None) -> list[Row]:
    """Each of the models on every task."""
    score = score or score_task
    return [Row(name, tuple(score(model, t, run, name) for t in run.tasks.tasks)) for name, model in models.items()]


@quiet_transformers()
def score_task(model: Model, task: AnyTask, run: Run, row: str) -> Score:
    """One model on one task."""
    started = time.perf_counter()

    def on_batch(done: int, total: int) -> None:
        run.on_progress(f"{row}: {task.name}", done, total)

    with with_host(model.device):
        if isinstance(task, Perplexity):
            found = _perplexity(model, task, run, on_batch)
        elif isinstance(task, LmEval):
            found = score_by_harness(model, task, run.tasks.resamples, run.seed(task))
            on_batch(found.about["examples"], found.about["examples"])
        else:
            found = _labelled(model, task, run, on_batch)
    found.about["seconds"] = round(time.perf_counter() - started, 3)
    return found


def _perplexity(model: Model, task: Perplexity, run: Run, on_batch: OnBatch) -> Score:
    network, tokens = open_text(model, task)
    losses = text_losses(network, tokens, task.context, task.stride, task.batch_size, on_batch)
    value = losses.perplexity()
    draws = bootstrap(losses.perplexity, len(losses.sums), run.tasks.resamples, run.seed(task))
    about = {"windows": len(losses.sums), "tokens": int(losses.counts.sum())}
    return Score(task.name, value, {"perplexity": value}, draws, about, is_perplexity=True)


def _labelled(
    model: Model, task: Classification | Regression | Images | ZeroShot, run: Run, on_batch: OnBatch
) -> Score:
    expert = run.model(task.expert) if task.expert else None
    heads = find_heads(
        task.name, task.head_label, model.checkpoint, expert.checkpoint if expert else None, task.head is not None
    )
    examples = open_examples(model, task, heads, expert)
    labels = examples.labels
    assert labels is not None  # load_tasks
    scores = score(examples.scorer.logits, examples.batch, examples.lengths, task.batch_size, run.device, on_batch)
    predictions: npt.NDArray[Any] = (
        scores[:, 0].astype(np.float64) if isinstance(task, Regression) else scores.argmax(1)
    )

    def metrics(rows: Any = slice(None)) -> dict[str, float]:
        return {name: METRICS[name](labels[rows], predictions[rows]) for name in task.metrics}

    def statistic(rows: Any) -> float:
        return float(np.mean(list(metrics(rows).values())))

    draws = bootstrap(statistic, len(labels), run.tasks.resamples, run.seed(task))
    return Score(task.name, statistic(slice(None)), metrics(), draws, {"examples": len(labels), **examples.about})
