"""Evaluates models on tasks: each example through the network once, the metrics, and their bootstrap."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.errors import UsageError
from acemerge.evaluation.data import Source, as_classes, as_numbers, as_texts, read_columns, read_text
from acemerge.evaluation.heads import Heads, find_heads
from acemerge.evaluation.images import open_images, pixels
from acemerge.evaluation.metrics import METRICS, bootstrap
from acemerge.evaluation.models import SEQUENCES, Model, Scorer, classifier, load_whole, open_model, pooled
from acemerge.evaluation.perplexity import text_losses
from acemerge.evaluation.predict import OnBatch, encode, score, score_texts
from acemerge.evaluation.tables import EXPERTS, Evaluation, Row, Score
from acemerge.evaluation.tasks import Classification, Images, Perplexity, Regression, Task, Tasks, ZeroShot
from acemerge.evaluation.zero_shot import zero_shot

# Told of the row and task, and how much of it is done, of how much.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """What all evaluations of one run share."""

    tasks: Tasks
    device: torch.device
    on_progress: OnProgress = lambda *_: None
    quiet: bool = True
    opened: dict[str, Model] = field(default_factory=dict, repr=False)

    def model(self, name: str) -> Model:
        """A model by its folder or Hub id, looked up once."""
        if name not in self.opened:
            self.opened[name] = open_model(name, self.device, self.quiet)
        return self.opened[name]

    def seed(self, task: Task) -> list[int]:
        """The same rows are drawn for every model on one task, others on another."""
        return [self.tasks.seed, zlib.crc32(task.name.encode())]


ScoreTask = Callable[[Model, Task, Run, str], Score]


def evaluate(models: Mapping[str, str], run: Run, score: ScoreTask | None = None) -> Evaluation:
    """Each named model on every task, after the experts, each on its own task. `score` is `score_task` by default."""
    score = score or score_task
    tasks = run.tasks.tasks
    opened = {name: run.model(path) for name, path in models.items()}  # a wrong name is found before the first score
    experts = {task.name: run.model(task.expert) for task in tasks if task.expert}
    if EXPERTS in opened:
        raise UsageError(EXPERTS, "is the name of the experts' own row", "rename the model's folder")
    rows = []
    if experts:
        own = (score(experts[t.name], t, run, EXPERTS) if t.name in experts else None for t in tasks)
        rows.append(Row(EXPERTS, tuple(own)))
    for name, model in opened.items():
        rows.append(Row(name, tuple(score(model, task, run, name) for task in tasks)))
    return Evaluation(tuple(task.name for task in tasks), tuple(rows))


def score_task(model: Model, task: Task, run: Run, row: str) -> Score:
    """One model on one task."""
    started = time.perf_counter()

    def on_batch(done: int, total: int) -> None:
        run.on_progress(f"{row}: {task.name}", done, total)

    if isinstance(task, Perplexity):
        found = _perplexity(model, task, run, on_batch)
    else:
        found = _labelled(model, task, run, on_batch)
    found.about["seconds"] = round(time.perf_counter() - started, 3)
    return found


def _perplexity(model: Model, task: Perplexity, run: Run, on_batch: OnBatch) -> Score:
    if task.text is None:
        text = read_text(Path(task.data))
    else:
        text = "\n\n".join(as_texts(read_columns(source(task), [task.text])[0], task.data))
    tokens = torch.tensor(model.tokenizer()(text, verbose=False)["input_ids"], dtype=torch.long)
    network = load_whole("AutoModelForCausalLM", model)
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest and task.context > longest:
        what = f"context {task.context} is over the model's {longest}"
        raise UsageError(f"task {task.name}", what, f"set `context: {longest}` or less")
    losses = text_losses(model.on_device(network), tokens, task.context, task.stride, task.batch_size, on_batch)
    value = losses.perplexity()
    draws = bootstrap(losses.perplexity, len(losses.sums), run.tasks.resamples, run.seed(task))
    about = {"windows": len(losses.sums), "tokens": int(losses.counts.sum())}
    return Score(task.name, value, {"perplexity": value}, draws, about, is_perplexity=True)


def _labelled(
    model: Model, task: Classification | Regression | Images | ZeroShot, run: Run, on_batch: OnBatch
) -> Score:
    if isinstance(task, Classification | Regression):
        labels, scores, about = _texts(model, task, run, on_batch)
    else:
        labels, scores, about = _images(model, task, run, on_batch)
    if isinstance(task, Regression):
        predictions: npt.NDArray[Any] = scores[:, 0].astype(np.float64)
    else:
        check_classes(task, labels, scores.shape[1])
        predictions = scores.argmax(1)

    def metrics(rows: Any = slice(None)) -> dict[str, float]:
        return {name: METRICS[name](labels[rows], predictions[rows]) for name in task.metrics}

    def statistic(rows: Any) -> float:
        return float(np.mean(list(metrics(rows).values())))

    draws = bootstrap(statistic, len(labels), run.tasks.resamples, run.seed(task))
    return Score(task.name, statistic(slice(None)), metrics(), draws, {"examples": len(labels), **about})


Labelled = tuple[npt.NDArray[Any], npt.NDArray[np.float32], dict[str, Any]]


def _texts(model: Model, task: Classification | Regression, run: Run, on_batch: OnBatch) -> Labelled:
    """Labels, scores (N, rows), and what is worth knowing."""
    *texts, values = read_columns(source(task), [*task.columns, task.label])
    tokenizer = model.tokenizer()
    encoded = encode(tokenizer, [as_texts(column, task.data) for column in texts], task.max_length)
    heads = _heads(model, task, run)
    scorer = classifier(model, SEQUENCES, heads) if task.pooling is None else pooled(model, task.pooling, heads)
    if isinstance(task, Regression):
        if scorer.rows != 1:
            raise UsageError(
                f"task {task.name}", f"a head of {scorer.rows} rows is no regression", "use classification"
            )
        labels: npt.NDArray[Any] = as_numbers(values, task.data)
    else:
        labels = as_classes(values, task.labels or _names(model, task, run, scorer), task.data)
    scores = score_texts(scorer.logits, tokenizer, encoded, task.batch_size, run.device, on_batch)
    return labels, scores, {"truncated": encoded.cut, "head": scorer.head_from}


def _images(model: Model, task: Images | ZeroShot, run: Run, on_batch: OnBatch) -> Labelled:
    images = open_images(source(task), task.image, task.label, task.labels)
    owner, about = model, {}
    if isinstance(task, ZeroShot):
        if images.names is None:
            raise UsageError(f"task {task.name}", "its classes have no names", "list them in `labels:`")
        logits, owner = zero_shot(model, task.clip, task.templates, images.names)
    else:
        scorer = classifier(model, "AutoModelForImageClassification", _heads(model, task, run))
        logits, about = scorer.logits, {"head": scorer.head_from}
    order = range(len(images.classes))
    scores = score(logits, pixels(owner, images), order, task.batch_size, run.device, on_batch)
    return images.classes, scores, about


def check_classes(task: Classification | Images | ZeroShot, labels: npt.NDArray[np.int64], rows: int) -> None:
    """UsageError where the labels, their names and the head's rows do not go together."""
    where = f"task {task.name}"
    if task.labels is not None and len(task.labels) != rows:
        raise UsageError(where, f"{len(task.labels)} labels for a head of {rows} rows", "list each row's class")
    if labels.max() >= rows:
        raise UsageError(
            where, f"class {labels.max()} is over the head's {rows} rows", "name another head or `labels:`"
        )
    if "f1" in task.metrics and rows != 2:
        raise UsageError(where, f"f1 is of two classes, and the head has {rows}", "use accuracy or matthews")


def source(task: Task) -> Source:
    return Source(task.data, task.subset, task.split, task.revision, task.limit)


def _heads(model: Model, task: Task, run: Run) -> Heads:
    expert = run.model(task.expert).checkpoint if task.expert else None
    return find_heads(task.name, task.head_label, model.checkpoint, expert)


def _names(model: Model, task: Task, run: Run, scorer: Scorer) -> Sequence[str] | None:
    """The classes' names that the owner of the head has in its configuration, where it says any."""
    config = (run.model(task.expert) if task.expert else model).checkpoint.config
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(scorer.rows)}:
        return None
    return [str(names[str(i)]) for i in range(scorer.rows)]
