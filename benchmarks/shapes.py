"""The layers that are merged in the benchmarks: real models, one row per distinct shape, random task vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """`count` layers of one model with weights (rows, columns) = (out, in)."""

    name: str
    rows: int
    columns: int
    count: int


@dataclass(frozen=True)
class Model:
    title: str
    experts: int
    layers: tuple[Layer, ...]


def transformer(blocks: int, width: int) -> tuple[Layer, ...]:
    """An encoder with separate q, k, v and o and an MLP four times as wide."""
    return (
        Layer("attention", width, width, 4 * blocks),
        Layer("MLP up", 4 * width, width, blocks),
        Layer("MLP down", width, 4 * width, blocks),
    )


def llama_block(width: int, narrow: int, wide: int) -> tuple[Layer, ...]:
    """One block of a Llama: `narrow` keys and values, a gated MLP."""
    return (
        Layer("q, o", width, width, 2),
        Layer("k, v", narrow, width, 2),
        Layer("MLP gate, up", wide, width, 2),
        Layer("MLP down", width, wide, 1),
    )


GPT2 = (  # Conv1D weights, transposed to (out, in)
    Layer("qkv", 2304, 768, 12),
    Layer("attention out", 768, 768, 12),
    Layer("MLP up", 3072, 768, 12),
    Layer("MLP down", 768, 3072, 12),
)
DEFAULT = ("vit-b", "vit-l", "vit-l-20", "gpt2", "roberta-l", "llama-3b", "llama-8b")
MODELS = {
    "vit-b": Model("ViT-B/16", 8, transformer(12, 768)),
    "vit-l": Model("ViT-L/14", 8, transformer(24, 1024)),
    "vit-l-20": Model("ViT-L/14", 20, transformer(24, 1024)),
    "gpt2": Model("GPT-2", 7, GPT2),
    "roberta-l": Model("RoBERTa-large", 8, transformer(24, 1024)),
    "llama-3b": Model("Llama-3.2-3B, one block", 3, llama_block(3072, 1024, 8192)),
    "llama-8b": Model("Llama-3.1-8B, one block", 4, llama_block(4096, 1024, 14336)),
    # Not in the default set: fewer rows in all experts than columns, and one to try the harness with.
    "llama-3b-2": Model("Llama-3.2-3B, one block", 2, llama_block(3072, 1024, 8192)),
    "tiny": Model("tiny", 4, transformer(2, 64)),
}
QUICK_ENTRIES = 1e7  # `--quick` leaves out layers with more entries in all task vectors together


@dataclass(frozen=True)
class Case:
    """One thing to time: a rule on one layer shape."""

    rule: str
    experts: int
    rows: int
    columns: int
    hetero: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    weights: bool = False  # merge weights, not task vectors: the subtraction and the addition are timed too

    def small(self) -> Case:
        """The same at a sixteenth of the size: what loads libraries and starts threads."""
        return Case(**{**asdict(self), "rows": max(self.rows // 16, 24), "columns": max(self.columns // 16, 24)})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))


def chosen_models(names: Iterable[str]) -> dict[str, Model]:
    """The models by name; SystemExit for a wrong one."""
    names = list(names)
    wrong = [name for name in names if name not in MODELS]
    if wrong:
        raise SystemExit(f"no model {', '.join(wrong)}; there are {', '.join(MODELS)}")
    return {name: MODELS[name] for name in names}


def fits_quick(experts: int, layer: Layer) -> bool:
    return experts * layer.rows * layer.columns <= QUICK_ENTRIES


def task_vectors(T: int, rows: int, columns: int, hetero: bool) -> Tensor:
    """A low-rank part that carries the task and noise, energies equal or spread twentyfold, (T, rows, columns)."""
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns) // 8
    D = torch.empty(T, rows, columns)
    for t, size in enumerate(torch.logspace(0, 1.3 if hetero else 0.05, T) * 0.02):
        task = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        noise = 0.3 * torch.randn(rows, columns, generator=generator)
        D[t] = size * (task / rank**0.5 + noise) / max(rows, columns) ** 0.5
    return D


def base_weight(rows: int, columns: int) -> Tensor:
    """A weight to add the task vectors to, (rows, columns)."""
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
