"""Batch norms: what counts steps is no weight, and what was measured on the way is averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder
from torch import Tensor

import acemerge

MEAN = "resnet.embedder.embedder.normalization.running_mean"
STEPS = "resnet.embedder.embedder.normalization.num_batches_tracked"


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """A base, and two that went on for three and for five steps."""
    import transformers

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    made = []
    for i, steps in enumerate((0, 3, 5)):
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config).train()
        for step in range(steps):
            torch.manual_seed(10 * i + step)
            model(torch.randn(2, 3, 32, 32))
        made.append(model.eval())
    return made


def _check(merged: dict[str, Tensor], models: list[Any]) -> None:
    _, one, two = (model.state_dict() for model in models)
    assert merged[STEPS].item() == 5
    assert merged[STEPS].dtype == torch.int64
    torch.testing.assert_close(merged[MEAN], (one[MEAN] + two[MEAN]) / 2)


def test_the_largest_counter_is_kept_in_files(models: list[Any], tmp_path: Path) -> None:
    for model, who in zip(models, ("base", "one", "two"), strict=True):
        model.save_pretrained(tmp_path / who)
    report = acemerge.merge(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], "average", out=tmp_path / "out")
    _check(load_folder(tmp_path / "out"), models)
    assert report.tensors[STEPS]["reason"] == "a counter of steps: the largest"
    assert sum("num_batches_tracked" in warning for warning in report.manifest["warnings"]) == 1


def test_the_largest_counter_is_kept_in_memory(models: list[Any]) -> None:
    _check(acemerge.merge_models(models[0], models[1:], "average").state_dict(), models)
    base, *experts = (model.state_dict() for model in models)
    _check(acemerge.merge_state_dicts(base, experts, "average"), models)
    _check(acemerge.merge_state_dicts(base, experts[::-1], "average"), models)
    assert base[STEPS].item() == 0
