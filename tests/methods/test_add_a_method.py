"""docs/add_a_method.md works as it is written: the rule in it passes what every rule must pass."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import conformance
import pytest
import torch
from builders import PlainModel, load_folder
from every_rule import AWKWARD, check_finite, check_repeats

import acemerge

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"


@pytest.fixture
def trimmed_mean(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the page's blocks as a module, with a registry and a table that forget them afterwards."""
    rule, registration, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("added_rule")
    monkeypatch.setitem(sys.modules, "added_rule", module)
    exec(compile(rule + registration + line, PAGE.name, "exec"), module.__dict__)
    for name, traits in module.traits.items():
        monkeypatch.setitem(conformance.RULES, name, traits)
    yield "trimmed_mean"
    del acemerge.METHODS["trimmed_mean"]


def test_the_rule_of_the_page_passes_the_table(trimmed_mean: str) -> None:
    for case in AWKWARD:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            check_finite(trimmed_mean, case, dtype)
            check_repeats(trimmed_mean, case, dtype)
    assert dataclasses.is_dataclass(acemerge.METHODS[trimmed_mean])


def test_an_expert_of_weight_zero_is_not_there(trimmed_mean: str) -> None:
    deltas = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_it = acemerge.merge_deltas(deltas, trimmed_mean, weights=[1.0, 0.0, 1.0, 1.0]).delta
    torch.testing.assert_close(with_it, acemerge.merge_deltas(deltas[[0, 2, 3]], trimmed_mean).delta)


def test_the_rule_of_the_page_merges_checkpoints(trimmed_mean: str, plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out", method=trimmed_mean)
    name = "layers.0.up.weight"
    median = torch.stack([tuned[name] - plain.base[name] for tuned in plain.tuned]).median(0).values
    torch.testing.assert_close(load_folder(plain.root / "out")[name], plain.base[name] + median)
    with pytest.raises(acemerge.UsageError, match="greater than or equal to 0"):
        acemerge.merge(base, experts, method=trimmed_mean, drop=-1)
