"""The suites that `auto` was first chosen on: the demo's digits, and text8's short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from experts import base_folder, expert, load_encoder, pooled, reader
from packages import default_cache
from safetensors.torch import load_file
from suite import Outcome, Prepared
from tasks import QUICK, TASKS, build, read
from torch import Tensor, nn

from acemerge import demo

_HELD_OUT = 250


def digits(cache: Path) -> Prepared:
    """The demo's six vision experts, each with its own classifier."""
    from transformers import ViTForImageClassification

    folder, data = cache / "digits", demo.load_digits()
    if not (folder / "experts" / demo.TASKS[-1].name).exists():
        demo.make_experts(folder, data, lambda _: None)
    base = ViTForImageClassification.from_pretrained(folder / "base").eval()
    paths = {task.name: folder / "experts" / task.name for task in demo.TASKS}
    experts = {n: ViTForImageClassification.from_pretrained(path).eval() for n, path in paths.items()}
    heads = {name: model.classifier for name, model in experts.items()}
    images, numbers = data.part(held_out=True)

    @torch.no_grad()
    def hits(body: Any, task: demo.Task) -> Tensor:
        logits = heads[task.name](body.vit(task.see(images)[:, None]).last_hidden_state[:, 0])
        return logits.argmax(1) == task.ask(numbers)

    def outcome(body: nn.Module) -> Outcome:
        return {task.name: hits(body, task) for task in demo.TASKS}

    bodies = {name: _as(base, model) for name, model in experts.items()}
    return Prepared(base, bodies, outcome, {task.name: hits(experts[task.name], task) for task in demo.TASKS})


def _as(base: Any, model: Any) -> Any:
    """The model's body under the base's own classifier: heads are no part of a merge."""
    made = type(base)(base.config)
    made.load_state_dict(base.state_dict())
    made.vit.load_state_dict(model.vit.state_dict())
    return made.eval()


def text8(_: Path, rank: int = 0) -> Prepared:
    """Four tasks of text on MiniLM, trained for a quarter of the steps; by LoRA of this rank, 0 for all weights."""
    cache = default_cache()
    asked = [task for task in TASKS if task.name in QUICK]
    base = base_folder(cache)
    folders = {task.name: expert(task, cache, 0, True, rank) for task in asked}
    experts = {name: load_encoder(base) for name in folders}
    heads = {}
    for name, folder in folders.items():
        weights = load_file(folder / "model.safetensors")
        experts[name].load_state_dict({n: w for n, w in weights.items() if not n.startswith("classifier.")})
        heads[name] = (weights["classifier.weight"], weights["classifier.bias"])
    inputs = {task.name: _inputs(task, cache, base) for task in asked}

    @torch.no_grad()
    def hits(body: nn.Module, name: str) -> Tensor:
        right = []
        for tokens, classes in inputs[name]:
            logits = nn.functional.linear(pooled(body, tokens), *heads[name])
            right.append(logits.argmax(1) == classes)
        return torch.cat(right)

    def outcome(body: nn.Module) -> Outcome:
        return {name: hits(body, name) for name in folders}

    return Prepared(load_encoder(base), experts, outcome, {name: hits(experts[name], name) for name in folders})


def _inputs(task: Any, cache: Path, base: Path) -> list[tuple[dict[str, Tensor], Tensor]]:
    import json

    data, encode = build(task, cache), reader(base, task)
    labels = json.loads((data / "labels.json").read_text())
    rows = read(data, "test")[:_HELD_OUT]
    batches = [rows[i : i + 50] for i in range(0, len(rows), 50)]
    return [(encode(batch), torch.tensor([labels.index(row["label"]) for row in batch])) for batch in batches]
