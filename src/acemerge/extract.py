"""A LoRA adapter out of a full fine-tune: a merge of one expert that is written as its best factors."""

from __future__ import annotations

from pathlib import Path

from acemerge.api import run_opened
from acemerge.checkpoints.named import output_path
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.merge_report import MergeReport
from acemerge.recipes.recipe import make_recipe


def extract_lora(
    model: str | Path, base: str | Path, rank: int, out: str | Path, options: RunOptions | None = None
) -> MergeReport:
    """Write an adapter for `base` with, for each linear layer, the best `B A` of this rank for `D = W - W0`.

    `B = U sqrt(s)` and `A = sqrt(s) V^T` of the leading singular triplets (Eckart and Young), in float32 with
    alpha = r, so that the factor on `B A` is 1. What else changed (embeddings, norms, biases) is not in the adapter:
    its energy counts as lost. Raises AcemergeError as a merge does.
    """
    if rank < 1:
        raise UsageError("--rank", f"{rank} is not a rank", "use 1 or more")
    options, out = options or RunOptions(), output_path(out)
    content = {"base": str(base), "experts": [str(model)], "method": "average", "as_lora": rank}
    opened = open_recipe(make_recipe(content, "extract-lora"), out, options)
    if opened.plan.adapters:
        raise CheckpointError(model, "is an adapter already", "name a full model")
    return run_opened(opened, out, options)
