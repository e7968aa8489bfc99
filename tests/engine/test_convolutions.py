"""Convolutions by the rule: linear layers of the patches that they see, in memory and in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder, make_model, perturb, write_adapter, write_checkpoint
from commands import failed, run
from torch import Tensor, nn

import acemerge
from acemerge.errors import CheckpointError, UsageError

T = 3
POINTWISE, PATCHES, SEQUENCE, DEPTHWISE, GROUPED, UP = (f"{i}.weight" for i in range(6))
AS_MATRIX = (POINTWISE, PATCHES, SEQUENCE)


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 3),
        nn.Conv1d(4, 5, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ConvTranspose2d(6, 8, 2, groups=2),
    )


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, list[nn.Module]]:
    """A base and experts whose convolutions are of every kind."""
    torch.manual_seed(0)
    base = layers()
    return base, [perturb(copy.deepcopy(base), seed) for seed in range(1, T + 1)]


def updates(models: tuple[nn.Module, list[nn.Module]], name: str) -> tuple[Tensor, Tensor]:
    """The base's tensor and the experts' task vectors of it."""
    base, experts = models
    W0 = base.state_dict()[name]
    return W0, torch.stack([expert.state_dict()[name] - W0 for expert in experts])


def of_layer(W0: Tensor, deltas: Tensor, method: str, **options: Any) -> Tensor:
    """The rule on the matrices (out, in k k)."""
    merged = acemerge.merge_deltas(deltas.flatten(2), method, base=W0.flatten(1), **options).delta
    return W0 + merged.reshape(W0.shape)


@pytest.mark.parametrize("method", ["ace", "kron_auto", "tsv_m"])
def test_a_convolution_is_a_layer_of_its_patches(models: tuple[nn.Module, list[nn.Module]], method: str) -> None:
    base, experts = models
    merged, report = acemerge.merge_models(base, experts, method, convolutions="rule", report=True)
    for name in AS_MATRIX:
        torch.testing.assert_close(merged.state_dict()[name], of_layer(*updates(models, name), method))
        assert report.tensors[name]["rule"] == method
        how = "over channels" if base.state_dict()[name].shape[-1] == 1 else "of patches"
        assert report.tensors[name]["reason"] == f"a convolution: a linear layer {how}"
    averaged = acemerge.merge_models(base, experts, method).state_dict()
    assert torch.equal(merged.state_dict()[DEPTHWISE], averaged[DEPTHWISE])
    assert report.tensors[DEPTHWISE]["reason"] == "a convolution of one channel for each output: averaged"


def test_each_group_is_a_matrix_of_its_own(models: tuple[nn.Module, list[nn.Module]]) -> None:
    merged, report = acemerge.merge_models(*models, "kron_auto", convolutions="rule", report=True)
    W0, deltas = updates(models, GROUPED)
    halves = [of_layer(W0[rows], deltas[:, rows], "kron_auto") for rows in (slice(4), slice(4, 8))]
    torch.testing.assert_close(merged.state_dict()[GROUPED], torch.cat(halves))
    assert report.tensors[GROUPED]["reason"] == "a convolution: a linear layer of patches, for each of its 2 groups"
    assert len(report.tensors[GROUPED]["slices"]) == 2


def test_a_transposed_convolution_makes_patches_of_channels(models: tuple[nn.Module, list[nn.Module]]) -> None:
    """Stored (in, out / groups, k, k): of each group the matrix is (out k k, in)."""
    merged = acemerge.merge_models(*models, "ace", convolutions="rule").state_dict()[UP]
    W0, deltas = updates(models, UP)
    for rows in (slice(3), slice(3, 6)):
        found = acemerge.merge_deltas(deltas[:, rows].flatten(2).mT, "ace").delta
        torch.testing.assert_close(merged[rows], W0[rows] + found.T.reshape(W0[rows].shape))


def test_in_files_as_in_memory(models: tuple[nn.Module, list[nn.Module]], tmp_path: Path) -> None:
    """Without an architecture nothing tells groups: one is assumed, and what reads one channel counts as depthwise."""
    states = [model.state_dict() for model in (models[0], *models[1])]
    base, *experts = (write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate(states))
    report = acemerge.merge(base, experts, "kron_auto", tmp_path / "out", convolutions="rule")
    merged = load_folder(tmp_path / "out")
    in_memory = acemerge.merge_state_dicts(states[0], states[1:], "kron_auto", convolutions="rule")
    assert all(torch.equal(merged[name], value) for name, value in in_memory.items())
    for name in (*AS_MATRIX, GROUPED):
        torch.testing.assert_close(merged[name], of_layer(*updates(models, name), "kron_auto"))
    assert report.tensors[DEPTHWISE]["rule"] == "average"
    assert report.manifest["recipe"]["convolutions"] == "rule"
    assert report.manifest["length"]["longest"] > 0  # there is no other layer


@pytest.mark.parametrize("convolutions", ["average", "rule"])
def test_the_embedding_of_patches(tmp_path: Path, convolutions: str) -> None:
    base, *experts = (perturb(make_model("vit"), seed) for seed in range(T + 1))
    for i, model in enumerate((base, *experts)):
        model.save_pretrained(tmp_path / f"m{i}")
    folders = [tmp_path / f"m{i}" for i in range(T + 1)]
    report = acemerge.merge(folders[0], folders[1:], "tsv_m", tmp_path / "out", convolutions=convolutions)
    (name,) = (name for name, tensor in report.tensors.items() if tensor["role"] == "convolution")
    assert name.endswith("patch_embeddings.projection.weight")
    W0, deltas = updates((base, experts), name)
    by_rule = of_layer(W0, deltas, "tsv_m")
    torch.testing.assert_close(
        load_folder(tmp_path / "out")[name], by_rule if convolutions == "rule" else W0 + deltas.mean(0)
    )


def test_a_rule_of_the_recipe_may_be_one_of_matrices(models: tuple[nn.Module, list[nn.Module]]) -> None:
    merged = acemerge.merge_models(*models, "average", rules=[{"match": PATCHES, "method": "tsv_m"}]).state_dict()
    torch.testing.assert_close(merged[PATCHES], of_layer(*updates(models, PATCHES), "tsv_m"))
    with pytest.raises(UsageError, match="tsv_m needs a matrix, but the tensor has shape \\[6, 1, 3, 3\\]; narrow"):
        acemerge.merge_models(*models, "average", rules=[{"match": DEPTHWISE, "method": "tsv_m"}])


def test_what_is_planned_and_looked_at(
    models: tuple[nn.Module, list[nn.Module]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [model.state_dict() for model in (models[0], *models[1])]
    folders = [write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    models_of = ["--base", folders[0], *(word for folder in folders[1:] for word in ("--expert", folder))]
    plans = {}
    for asked in ("average", "rule"):
        code, out, _ = run(capsys, "plan", *models_of, "--method", "ace", "--convolutions", asked)
        assert code == 0
        plans[asked] = out
    assert "ace (convolution): a convolution: a linear layer of patches" in plans["rule"]
    for plan in plans.values():
        assert "ace (convolution): a convolution: a linear layer over channels" in plan
    assert "linear layer of patches" not in plans["average"]
    _, out, _ = run(capsys, "inspect", *models_of, "--convolutions", "rule")
    assert " of 5" in out  # all but the depthwise one
    failed(run(capsys, "plan", *models_of, "--convolutions", "base"), 2, "--convolutions")


def test_an_adapter_of_convolutions_is_refused_with_a_cure(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"conv.weight": torch.ones(8, 6, 3, 3)})
    adapter = write_adapter(tmp_path / "adapter", {"conv": (torch.ones(2, 6, 3, 3), torch.ones(8, 2, 1, 1))})
    with pytest.raises(CheckpointError, match="no matrices; merge it into its base with peft"):
        acemerge.merge(base, [adapter], "ace", convolutions="rule")
