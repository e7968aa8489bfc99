"""Adapters that PEFT makes, and what it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from builders import make_model


def train(model: Any, folder: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter of `model` in which nothing is zero."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder)
    return folder


def merged_by_peft(family: str, base: Path, adapter: Path) -> Any:
    model = type(make_model(family)).from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
