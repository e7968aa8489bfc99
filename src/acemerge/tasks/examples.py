"""A task's examples, made ready for one model: in batches that its scorer takes, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import hub_id
from acemerge.errors import UsageError
from acemerge.shapes import Int, Tensor
from acemerge.tasks.data import DataSource, as_classes, as_numbers, as_texts, read_columns, read_text
from acemerge.tasks.heads import Heads
from acemerge.tasks.images import open_images, pixels
from acemerge.tasks.networks import SEQUENCES, Model, Scorer, classifier, load_whole, pooled
from acemerge.tasks.predict import Batches, encode, text_batches
from acemerge.tasks.task_file import Classification, Images, Perplexity, Regression, Task, ZeroShot
from acemerge.tasks.zero_shot import zero_shot


@dataclass(frozen=True)
class Examples:
    """Examples, `lengths` of them in tokens, and what is worth knowing. `labels` (N,) where the task has any."""

    scorer: Scorer
    batch: Batches
    lengths: Sequence[int]
    labels: npt.NDArray[Any] | None
    about: dict[str, Any]


def open_examples(
    model: Model, task: Classification | Regression | Images | ZeroShot, heads: Heads, expert: Model | None
) -> Examples:
    """The task's examples for `model`. The names of classes may be in the configuration of `expert`, whose head it is.

    UsageError, CheckpointError where they and the model do not go together.
    """
    if isinstance(task, Classification | Regression):
        return _texts(model, task, heads, expert or model)
    return _images(model, task, heads)


def open_text(model: Model, task: Perplexity) -> tuple[Any, Int[Tensor, " N"]]:
    """The causal language model, on its device, and the tokens of the task's text."""
    tokens = torch.tensor(model.tokenizer()(text_of(task), verbose=False)["input_ids"], dtype=torch.long)
    network = load_whole("AutoModelForCausalLM", model)
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest and task.context > longest:
        what = f"context {task.context} is over the model's {longest}"
        raise UsageError(f"task {task.name}", what, f"set `context: {longest}` and a `stride` of no more")
    return model.on_device(network), tokens


def text_of(task: Perplexity) -> str:
    """The task's file, or its rows with blank lines between."""
    if task.text is None:
        if files.kind(Path(task.data)) != "file" and hub_id(task.data) is not None:
            cure = "name its column by `text:`, and its `split:`"
            raise UsageError(task.data, "is a data set, of which no column is named", cure)
        return read_text(Path(task.data))
    return "\n\n".join(as_texts(read_columns(source(task), [task.text])[0], task.data))


def _texts(model: Model, task: Classification | Regression, heads: Heads, owner: Model) -> Examples:
    labelled = [] if task.label is None else [task.label]
    columns = read_columns(source(task), [*task.columns, *labelled])
    texts = columns[: len(task.columns)]
    tokenizer = model.tokenizer()
    encoded = encode(tokenizer, [as_texts(column, task.data) for column in texts], task.max_length)
    scorer = classifier(model, SEQUENCES, heads) if task.pooling is None else pooled(model, task.pooling, heads)
    if isinstance(task, Regression) and scorer.rows != 1:
        what = f"a head of {scorer.rows} rows is no regression"
        raise UsageError(f"task {task.name}", what, "use classification")
    labels: npt.NDArray[Any] | None = None
    if isinstance(task, Regression) and labelled:
        labels = as_numbers(columns[-1], task.data)
    elif isinstance(task, Classification) and labelled:
        labels = as_classes(columns[-1], task.labels, task.data, _names(owner, scorer))
        check_classes(task, labels, scorer.rows)
    about = {"truncated": encoded.cut, "head": scorer.head_from}
    return Examples(scorer, text_batches(tokenizer, encoded), encoded.lengths, labels, about)


def _images(model: Model, task: Images | ZeroShot, heads: Heads) -> Examples:
    images = open_images(source(task), task.image, task.label, task.labels)
    if isinstance(task, ZeroShot):
        if images.names is None:
            raise UsageError(f"task {task.name}", "its classes have no names", "list them in `labels:`")
        scorer, owner = zero_shot(model, task.clip, task.templates, images.names)
        about = {}
    else:
        scorer, owner = classifier(model, "AutoModelForImageClassification", heads), model
        about = {"head": scorer.head_from}
    check_classes(task, images.classes, scorer.rows)
    return Examples(scorer, pixels(owner, images), [1] * len(images.classes), images.classes, about)


def check_classes(task: Classification | Images | ZeroShot, labels: npt.NDArray[np.int64], rows: int) -> None:
    """UsageError where the labels, their names and the head's rows do not go together."""
    where = f"task {task.name}"
    if task.labels is not None and len(task.labels) != rows:
        what = f"{len(task.labels)} labels for a head of {rows} rows"
        raise UsageError(where, what, "list each row's class, or name another head by `expert:`")
    if labels.max() >= rows:
        what = f"class {labels.max()} is over the head's {rows} rows, which count from 0"
        cure = "name another head by `expert:`, or by `labels:` the classes in the order of its rows"
        raise UsageError(where, what, cure)
    if "f1" in task.metrics and rows != 2:
        raise UsageError(where, f"f1 is of two classes, and the head has {rows}", "use accuracy or matthews")


def source(task: Task) -> DataSource:
    return DataSource(task.data, task.subset, task.split, task.revision, task.limit)


def _names(owner: Model, scorer: Scorer) -> Sequence[str] | None:
    """The classes' names that the owner of the head has in its configuration, where it says any."""
    names = owner.checkpoint.config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(scorer.rows)}:
        return None
    return [str(names[str(i)]) for i in range(scorer.rows)]
