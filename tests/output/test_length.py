"""How far a merge goes beside its experts: the figures in the manifest, and the warning where it is too far."""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path

import pytest
import torch
from builders import write_adapter, write_checkpoint

import acemerge
from acemerge.api import run_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.output.verify import verify
from acemerge.recipes.recipe import load_recipe

UP, DOWN = "layers.0.up.weight", "layers.1.up.weight"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Two experts that change other entries: updates of norm 3 and 4 in one layer, of 0 and 4 in the other."""
    base = {name: torch.eye(8) for name in (UP, DOWN)} | {"norm.weight": torch.ones(8)}
    first, second = ({name: value.clone() for name, value in base.items()} for _ in range(2))
    first[UP][0, 1] += 3
    second[UP][2, 3] += 4
    second[DOWN][2, 3] += 4
    first["norm.weight"] += 100  # no linear layer
    return write_checkpoint(tmp_path / "base", base), [
        write_checkpoint(tmp_path / name, tensors) for name, tensors in (("a", first), ("b", second))
    ]


def test_the_sum_of_updates_at_right_angles(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    report = acemerge.merge(base, experts, "task_arithmetic", tmp_path / "out", scale=1.0)
    assert report.manifest["length"] == {
        "merged": pytest.approx(sqrt(9 + 16 + 16)),
        "longest": pytest.approx(sqrt(16 + 16)),
        "orthogonal": pytest.approx(sqrt(9 + 16 + 16)),
        "worst": UP,
        "worst_ratio": pytest.approx(5 / 4),
        "base": pytest.approx(4),
        "farthest": UP,
        "farthest_ratio": pytest.approx(5 / sqrt(8)),
    }
    assert report.manifest["warnings"] == []
    assert verify(tmp_path / "out")["length"] == report.manifest["length"]
    assert report.tensors[UP]["merged_energy"] == pytest.approx(25)


def test_a_merge_that_overshoots_is_told_how_to_come_back(models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    (warning,) = acemerge.merge(base, experts, "task_arithmetic", scale=1.5).manifest["warnings"]
    assert warning.startswith(
        "the merged update overshoots, 1.7 times the longest expert's, 1.5 times all at right angles"
    )
    assert "--scale 1, or --method auto is nearer" in warning
    assert acemerge.merge(base, experts, "task_arithmetic", scale=1.0).manifest["warnings"] == []  # the cure cures
    (warning,) = acemerge.merge(base, experts, "ace", scale=2.0).manifest["warnings"]
    assert "a larger eps, as --set eps=1e-2" in warning
    assert acemerge.merge(base, experts, "auto").manifest["warnings"] == []
    (warning,) = acemerge.merge(base, experts, "auto", scale=4.0).manifest["warnings"]
    assert "or another rule is nearer" in warning


def test_the_scale_that_is_advised_is_of_the_rules_own(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Eight equal experts: 0.3 times the sum is 2.4 times the longest, and still under what right angles would give."""
    base, (first, _) = models
    eight = [shutil.copytree(first, tmp_path / f"e{i}") for i in range(8)]
    warnings = acemerge.merge(base, eight, "task_arithmetic").manifest["warnings"]
    assert any("--scale 0.25, or --method auto is nearer" in warning for warning in warnings)
    again = acemerge.merge(base, eight, "task_arithmetic", scale=0.25).manifest["warnings"]
    assert not any("overshoots" in warning for warning in again)


def test_what_a_rule_of_the_recipe_makes_is_mended_there(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """`--scale` would change nothing of it; and with a file of mergekit's it is refused."""
    base, experts = models
    rule = {"match": "layers.*", "method": {"name": "task_arithmetic", "scale": 1.5}}
    (warning,) = acemerge.merge(base, experts, "ties", rules=[rule]).manifest["warnings"]
    assert warning.endswith("; smaller weights, a smaller scale or another method in the rule 'layers.*'")
    for nearer in (
        rule | {"weights": [0.6, 0.6]},
        rule | {"method": "task_arithmetic"},
        rule | {"method": "kron_auto"},
    ):
        assert acemerge.merge(base, experts, "ties", rules=[nearer]).manifest["warnings"] == []
    for weight, cured in ((1.5, False), (1.0, True)):
        content = {"merge_method": "task_arithmetic", "base_model": str(base)}
        content["models"] = [{"model": str(expert), "parameters": {"weight": weight}} for expert in experts]
        (tmp_path / "mergekit.yaml").write_text(json.dumps(content))
        recipe = load_recipe(tmp_path / "mergekit.yaml", {})
        found = run_recipe(recipe, None, RunOptions()).manifest["warnings"]
        assert [warning.endswith("; smaller weights in the recipe") for warning in found] == [True] * (not cured)


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_measured_by_their_factors(tmp_path: Path, whole: bool) -> None:
    base = write_checkpoint(tmp_path / "base", {UP: torch.eye(64)})
    generator = torch.Generator().manual_seed(0)
    pairs = [(0.1 * torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)) for _ in range(2)]
    updates = [B @ A for A, B in pairs]
    experts = [write_adapter(tmp_path / f"a{i}", {UP.removesuffix(".weight"): pair}) for i, pair in enumerate(pairs)]
    if whole:
        experts = [write_checkpoint(tmp_path / f"w{i}", {UP: torch.eye(64) + D}) for i, D in enumerate(updates)]
    report = acemerge.merge(base, experts, "average")
    assert report.manifest["length"]["merged"] == pytest.approx(float(sum(updates).norm()) / 2, rel=1e-5)


def test_where_nothing_is_merged_there_is_no_length(models: tuple[Path, list[Path]]) -> None:
    base, _ = models
    assert acemerge.merge(base, [base], "average").manifest["length"] is None


def test_embeddings_that_overshoot_are_told_apart_from_layers(tmp_path: Path) -> None:
    base = {UP: torch.eye(8), "embed_tokens.weight": torch.eye(8)}
    tuned = [{name: W + seeded(name, t) for name, W in base.items()} for t in range(2)]
    folder, *experts = (write_checkpoint(tmp_path / f"m{i}", tensors) for i, tensors in enumerate((base, *tuned)))
    rules = [{"match": "embed*", "method": {"name": "tsv_m", "scale": 3.0}}]
    report = acemerge.merge(folder, experts, "average", rules=rules)
    (warning,) = report.manifest["warnings"]
    assert warning.startswith("embeddings and heads by the rule overshoot, ")
    assert "most in embed_tokens.weight" in warning
    assert report.manifest["length"]["worst"] == UP
    assert acemerge.merge(folder, experts, "average").manifest["warnings"] == []


def seeded(name: str, t: int) -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(len(name) + t)) / 10
