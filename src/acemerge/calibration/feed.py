"""A task's data through one network: in batches without padding, or example by example with its likelihood."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from acemerge.errors import NumericalError, UsageError
from acemerge.shapes import Float, Int, Tensor
from acemerge.tasks.data import read_columns
from acemerge.tasks.examples import Examples, open_examples, open_text, source, text_of
from acemerge.tasks.heads import find_heads
from acemerge.tasks.images import open_images
from acemerge.tasks.networks import Model
from acemerge.tasks.own_text import OwnText, open_writer
from acemerge.tasks.perplexity import token_losses
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE
from acemerge.tasks.task_file import Classification, Images, Perplexity, Regression, Task, ZeroShot


@dataclass(frozen=True)
class Feed:
    """`lengths` are those of the examples, `forward` runs some of one length, `log_likelihood` scores one.

    What an example answers is the data's label, or where it has none drawn from the network's own answer; in
    `drawn_log_likelihood` it is always drawn, of a text every token.
    """

    network: nn.Module
    lengths: Sequence[int]
    batch_size: int
    forward: Callable[[Sequence[int]], Tensor]
    log_likelihood: Callable[[int], Float[Tensor, ""]]
    drawn_log_likelihood: Callable[[int], Float[Tensor, ""]]

    def batches(self) -> Iterator[list[int]]:
        """The numbers of all examples: together those of one length, so that nothing is padded."""
        of_length: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            of_length.setdefault(length, []).append(i)
        for _, rows in sorted(of_length.items(), reverse=True):
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]


def open_feed(model: Model, task: Task | OwnText, labelled: bool) -> Feed:
    """The task's data for the expert that it belongs to; without `labelled` no label is read.

    UsageError, CheckpointError where they do not go together.
    """
    if isinstance(task, OwnText):
        feed = _of_windows(open_writer(model), task.windows, task)
    else:
        feed = _of_text(model, task) if isinstance(task, Perplexity) else _of_examples(model, task, labelled)
    eager = getattr(feed.network, "set_experts_implementation", None)
    if eager is not None and getattr(feed.network, "_can_set_experts_implementation", lambda: False)():
        eager("eager")  # expert by expert, so that each one's inputs are seen
    return feed


def _of_text(model: Model, task: Perplexity) -> Feed:
    network, tokens = open_text(model, task)
    windows = [window for window in tokens.split(task.context) if len(window) > 1]
    if not windows:
        raise UsageError(f"task {task.name}", "the text has fewer than two tokens", "name a longer text")
    return _of_windows(network, windows, task)


def _of_windows(network: Any, tokens: Sequence[Int[Tensor, " L"]], task: Perplexity | OwnText) -> Feed:
    windows = [window.to(network.device) for window in tokens]

    def forward(rows: Sequence[int]) -> Tensor:
        logits: Tensor = network(input_ids=torch.stack([windows[i] for i in rows])).logits
        return logits

    def log_likelihood(i: int) -> Tensor:
        return -token_losses(forward([i])[0], windows[i], 1).sum()

    def drawn_log_likelihood(i: int) -> Tensor:
        logs = log_softmax(forward([i])[0].float(), -1)
        drawn = _drawn(logs, _chance(task, i)).to(logs.device)
        return logs.gather(1, drawn).sum()

    lengths = [len(window) for window in windows]
    return Feed(network, lengths, task.batch_size, forward, log_likelihood, drawn_log_likelihood)


def _of_examples(model: Model, task: Classification | Regression | Images | ZeroShot, labelled: bool) -> Feed:
    asked = task
    if not labelled and isinstance(task, Classification | Regression):
        asked = task.model_copy(update={"label": None})
    heads = find_heads(task.name, task.head_label, model.checkpoint, None, task.head is not None)
    examples = open_examples(model, asked, heads, model)

    def forward(rows: Sequence[int]) -> Tensor:
        return examples.scorer.logits({key: value.to(model.device) for key, value in examples.batch(rows).items()})

    def log_likelihood(i: int) -> Tensor:
        label = None if examples.labels is None else examples.labels[i]
        return _log_likelihood(forward([i])[0], i, examples, task, label)

    def drawn_log_likelihood(i: int) -> Tensor:
        return _log_likelihood(forward([i])[0], i, examples, task, None)

    network = examples.scorer.network
    return Feed(network, examples.lengths, task.batch_size, forward, log_likelihood, drawn_log_likelihood)


def _drawn(logs: Tensor, chance: torch.Generator) -> Tensor:
    """An answer of each row, by the logarithms of their probabilities."""
    if logs.isnan().any():
        raise NumericalError("calibration", "the model's scores are not finite", ARE_WEIGHTS_FINITE)
    return torch.multinomial(logs.detach().exp().cpu(), 1, generator=chance)


def _chance(task: Task | OwnText, i: int) -> torch.Generator:
    """An example's draw depends on the task and its number alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{task.name}/{i}".encode()))


def _log_likelihood(
    scores: Float[Tensor, " K"], i: int, examples: Examples, task: Task, label: Any
) -> Float[Tensor, ""]:
    """`log p(label | example)` up to a constant: of classes by their softmax, of numbers with variance one. Without a
    label it is drawn.
    """
    chance = _chance(task, i)
    if isinstance(task, Regression):
        answer = scores[0]
        drawn = answer.item() + torch.randn((), generator=chance).item()
        return -0.5 * (answer - (drawn if label is None else float(label))) ** 2
    if isinstance(task, ZeroShot):
        scores = scores * examples.scorer.network.logit_scale.exp().to(scores)  # type: ignore[operator]
    logs = log_softmax(scores.float(), 0)
    if label is None:
        label = _drawn(logs, chance).item()
    return logs[int(label)]


def labels_of(task: Task | OwnText, labelled: bool) -> str:
    """Where a task's labels are from, in words."""
    if not labelled:
        return "not read"
    if isinstance(task, Perplexity | OwnText):
        return "the text's own tokens"
    unlabelled = isinstance(task, Classification | Regression) and task.label is None
    return "drawn from the expert's own answers" if unlabelled else "given"


def about_data(task: Task | OwnText, labelled: bool) -> dict[str, Any]:
    """The SHA-256 of all that is read of a task's data (texts, pixels and, where `labelled`, labels), and how much it
    is: examples, or the characters of a text. Of text that is not yet written, what decides it.
    """
    if isinstance(task, OwnText):
        return task.about
    digest = hashlib.sha256()
    if isinstance(task, Images | ZeroShot):
        images = open_images(source(task), task.image, task.label, task.labels)
        for i, number in enumerate(images.classes.tolist()):
            image: Any = images.image(i)
            digest.update(f"{number} {image.size}".encode())
            digest.update(image.tobytes())
        return {"sha256": digest.hexdigest(), "examples": len(images.classes)}
    if isinstance(task, Perplexity):
        text = text_of(task)
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}
    columns = read_columns(
        source(task), [*task.columns, *([task.label] if labelled and task.label is not None else [])]
    )
    for values in columns:
        digest.update(json.dumps([str(value) for value in values]).encode())
    return {"sha256": digest.hexdigest(), "examples": len(columns[0])}
