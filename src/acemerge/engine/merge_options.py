"""What `acemerge.merge` may be given by name: the keys of a recipe, the options of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from acemerge.engine.execute import Progress


class MergeOptions(TypedDict, total=False):
    """Beside these, the parameters of the rule: `eps=1e-4`."""

    # Of the recipe: they decide the values.
    weights: Sequence[float] | None
    scale: float | None
    policy: Literal["default", "paper"]
    embeddings: Literal["average", "rule", "base"]
    convolutions: Literal["average", "rule"]
    vocabulary: Literal["refuse", "base", "union", "assets"]
    missing_tokens: Literal["skip", "base", "mean"]
    orientation: Literal["input", "stored"]
    split_qkv: bool
    join_qkv: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    compute_dtype: Literal["float32", "float64"]
    nonfinite: Literal["error", "skip-expert"]
    seed: int
    assets: str
    as_lora: int | None
    compress: Literal["first", "last"]
    calibration: str | Path | None
    chat_template: str | None
    slices: Sequence[Mapping[str, Any]]
    rules: Sequence[Mapping[str, Any]]
    # Of the run: they decide how it is done.
    device: str | torch.device
    max_shard_size: str | int
    workers: int
    overwrite: bool
    resume: bool
    max_memory: str | int | None
    allow_pickle: bool
    dequantize: bool
    force: bool
    quiet: bool
    push: str | None
    report: bool
    shard: str | None
    finish: bool
    ray: str | None
    stream: bool
    hash_files: bool
    on_progress: Callable[[Progress], None]
