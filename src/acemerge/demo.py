"""The demo: real images, offline. A small vision transformer, its experts, and their merges side by side.

The images are scikit-learn's 1,797 handwritten digits (UCI, 8 x 8). One base is trained on them, then one
expert for each task; the tasks see the same images in another way or ask another question of them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch import nn

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import HEADS
from acemerge.checkpoints.weight_files import SINGLE
from acemerge.errors import AcemergeError, UsageError, printable
from acemerge.models.quiet import quiet_transformers
from acemerge.shapes import Float, Tensor

# ACE's ridge is in units of the squared update, and these updates are far larger than a language model's:
# the last row shows what choosing it does.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("average", ("--method", "average")),
    ("task_arithmetic", ("--method", "task_arithmetic")),
    ("ace", ("--method", "ace")),
    ("auto", ("--method", "auto")),
    ("ace-eps-1e-2", ("--method", "ace", "--set", "eps=1e-2")),
)
_TRAIN = 1200  # images for training; the other 597 are held out
_BATCH = 64


@dataclass(frozen=True)
class DigitTask:
    """How a task sees an image (N, 8, 8) and what it asks about the digit."""

    name: str
    see: Callable[[Tensor], Tensor]
    ask: Callable[[Tensor], Tensor]
    classes: int = 10


def _occlude(images: Tensor) -> Tensor:
    hidden = images.clone()
    hidden[:, 2:6, 2:6] = 0
    return hidden


def _same(values: Tensor) -> Tensor:
    return values


DIGIT = DigitTask("digit", _same, _same)
# Four ways of seeing the images, then two questions about them.
VIEWS = (
    DigitTask("rotated", lambda x: x.rot90(1, (1, 2)), _same),
    DigitTask("inverted", lambda x: 1 - x, _same),
    DigitTask("mirrored", lambda x: x.flip(2), _same),
    DigitTask("occluded", _occlude, _same),
)
TASKS = (
    *VIEWS,
    DigitTask("parity", _same, lambda y: y % 2, 2),
    DigitTask("high-half", _same, lambda y: (y >= 5).long(), 2),
)


@dataclass(frozen=True)
class Digits:
    """Images in 0..1, (N, 8, 8), and digits (N,), in training and held-out parts."""

    images: Float[Tensor, "N 8 8"]
    digits: Tensor

    def part(self, held_out: bool) -> tuple[Tensor, Tensor]:
        rows = slice(_TRAIN, None) if held_out else slice(_TRAIN)
        return self.images[rows], self.digits[rows]


def load_digits() -> Digits:
    try:
        from sklearn import datasets
    except ImportError:
        raise UsageError("demo", "scikit-learn is not installed", "pip install 'acemerge[demo]'") from None
    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order] / 16
    return Digits(images, torch.tensor(bunch.target)[order])


def make_model(classes: int) -> Any:
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        raise UsageError("demo", "transformers is not installed", "pip install 'acemerge[demo]'") from None
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, num_labels=classes, initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """The base's mild variety: two batches in five are shown in one of the four views."""
    draw = int(torch.randint(10, (), generator=generator))
    return VIEWS[draw].see(images) if draw < len(VIEWS) else images


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """A shift by up to one pixel and some noise."""
    dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return (images.roll((dx, dy), (1, 2)) + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def train(model: nn.Module, task: DigitTask, data: Digits, epochs: int, rate: float, seed: int) -> None:
    images, digits = data.part(held_out=False)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    steps = epochs * (len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for rows in _batches(len(images), epochs, generator):
        seen = task.see(_jitter(images[rows], generator))
        if task is DIGIT:
            seen = _varied(seen, generator)
        logits = model(seen[:, None]).logits
        nn.functional.cross_entropy(logits, task.ask(digits[rows])).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    model.eval()


def _batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % _BATCH].split(_BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, task: DigitTask, data: Digits) -> float:
    """Share of held-out images that the model answers rightly."""
    images, digits = data.part(held_out=True)
    guesses = model(task.see(images)[:, None]).logits.argmax(1)
    return float((guesses == task.ask(digits)).double().mean())


def make_experts(folder: Path, data: Digits, say: Callable[[str], None]) -> None:
    """Train and save the base and one expert for each task, as ordinary checkpoints."""
    torch.manual_seed(0)
    base = make_model(DIGIT.classes)
    train(base, DIGIT, data, epochs=100, rate=1e-3, seed=0)
    base.save_pretrained(folder / "base")
    say(f"trained base        {accuracy(base, DIGIT, data):6.1%} of held-out digits")
    for seed, task in enumerate(TASKS, 1):
        expert = make_expert(base, task, data, seed)
        expert.save_pretrained(folder / "experts" / task.name)
        say(f"trained {task.name:<12}{accuracy(expert, task, data):6.1%}")


def make_expert(base: nn.Module, task: DigitTask, data: Digits, seed: int) -> Any:
    """A task's expert, trained from the base; its head too where both have as many classes."""
    torch.manual_seed(seed)
    expert, weights = make_model(task.classes), base.state_dict()
    if task.classes != DIGIT.classes:
        weights = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    expert.load_state_dict(weights, strict=False)
    train(expert, task, data, epochs=25, rate=3e-4, seed=seed)
    return expert


def with_head(body: Path, head: Path, task: DigitTask) -> Any:
    """The model in `body` with the classifier weights of the file `head`."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(body, num_labels=task.classes, ignore_mismatched_sizes=True)
    weights = {name: value for name, value in load_file(head).items() if name.startswith("classifier.")}
    model.load_state_dict(weights, strict=False)
    model.eval()
    return model


def accuracies(body: Path, folder: Path, data: Digits) -> list[float]:
    """Held-out accuracy of one body on every task, with each expert's own head."""
    heads = [folder / "experts" / task.name / SINGLE for task in TASKS]
    merged = [body / HEADS / f"{task.name}.safetensors" for task in TASKS]
    chosen = merged if merged[0].exists() else heads
    return [accuracy(with_head(body, head, task), task, data) for task, head in zip(TASKS, chosen, strict=True)]


def merge_by_command(folder: Path, name: str, options: Sequence[str], say: Callable[[str], None]) -> Path:
    """Merge as a user would, by the command line, and show the command."""
    out = folder / f"merged-{name}"
    experts = [word for task in TASKS for word in ("--expert", str(folder / "experts" / task.name))]
    command = ["merge", "--base", str(folder / "base"), *experts, *options, "-o", str(out), "--overwrite"]
    shown = " ".join(["acemerge merge --base base --expert ...", *options, "-o", out.name])
    say(f"$ {shown}")
    finished = subprocess.run([sys.executable, "-m", "acemerge", *command, "--quiet"], check=False)
    if finished.returncode:
        raise DemoError("demo", f"the merge above failed with exit code {finished.returncode}", "see its message")
    return out


class DemoError(AcemergeError):
    """A step of the demo failed."""


def run_demo(folder: Path, console: Console) -> None:
    """Train, merge by every rule, evaluate, and print the table."""
    started = time.perf_counter()
    files.make_folder(folder)
    known = (folder / "base").is_dir() and (folder / "experts").is_dir()
    if not known and any(folder.iterdir()):
        raise UsageError(folder, "is not empty", "choose another folder with -o")

    def say(text: str) -> None:
        console.print(Text(printable(text)), soft_wrap=True)

    data = load_digits()
    with quiet_transformers():
        say(f"1,797 handwritten digits from scikit-learn; {_TRAIN:,} to train, {len(data.digits) - _TRAIN} held out")
        make_experts(folder, data, say)
        experts = [accuracies(folder / "experts" / task.name, folder, data)[i] for i, task in enumerate(TASKS)]
        rows = [("each expert, alone", experts), ("base", accuracies(folder / "base", folder, data))]
        for name, options in RULES:
            out = merge_by_command(folder, name, options, say)
            rows.append((name, accuracies(out, folder, data)))
    console.print(score_table(rows, experts))
    say(f"{time.perf_counter() - started:.0f} s; the models are in {folder}")
    say(f"open {folder / 'merged-ace' / 'acemerge.json'} to see what was done to each tensor")


def score_table(rows: Sequence[tuple[str, Sequence[float]]], experts: Sequence[float]) -> Table:
    """Accuracies in percent; `of experts` is the mean over tasks of accuracy / the expert's accuracy."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held-out accuracy, %")
    for column in (*(task.name for task in TASKS), "mean", "of experts"):
        table.add_column(column, justify="right")
    for name, scores in rows:
        normalised = sum(score / best for score, best in zip(scores, experts, strict=True)) / len(scores)
        cells = [*scores, sum(scores) / len(scores), normalised]
        table.add_row(name, *(f"{100 * cell:.1f}" for cell in cells))
    return table
