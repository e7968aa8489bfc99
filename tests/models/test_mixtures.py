"""Mixtures of experts: a matrix for each expert or one tensor for all, in the base, in an expert, in either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder, make_model, perturb, write_checkpoint
from hashes import stored_hashes
from oracles import relative_error

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.reader import Reader, Span
from acemerge.models.mixtures import as_stored
from acemerge.models.roles import find_roles
from acemerge.planning import pieces

LAYOUTS = {"apart": {}, "together": {"save_original_format": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A base and two experts in both layouts."""
    root, made = tmp_path_factory.mktemp("mixtures"), {}
    for layout, how in LAYOUTS.items():
        for seed, who in enumerate(("base", "one", "two")):
            model: Any = make_model("qwen3_moe")
            perturb(model, seed, 0.02 if seed else 0.0)
            made[who, layout] = root / f"{who}-{layout}"
            model.save_pretrained(made[who, layout], **how, max_shard_size="20kB")
    return made


@pytest.mark.parametrize("of_base", LAYOUTS)
@pytest.mark.parametrize("of_rows", [False, True])
def test_any_layout_is_merged_into_that_of_the_base(
    models: dict[tuple[str, str], Path], of_base: str, of_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of_rows:  # large tensors are read a few rows at a time
        monkeypatch.setattr(pieces, "_PIECE", 1000)
    base, other = models["base", of_base], models["two", "together" if of_base == "apart" else "apart"]
    report = acemerge.merge(base, [models["one", of_base], other], "average", out=tmp_path / "out")
    assert any("two" in warning and "layout" in warning for warning in report.manifest["warnings"])
    merged, one, two = (load_folder(f) for f in (tmp_path / "out", models["one", of_base], models["two", of_base]))
    assert merged.keys() == load_folder(base).keys()
    for name, value in merged.items():
        assert relative_error(value, (one[name].double() + two[name].double()) / 2) < 1e-6, name


def test_a_view_has_the_values_and_the_hashes_of_its_files(models: dict[tuple[str, str], Path]) -> None:
    base, model = (open_checkpoint(models[key]) for key in (("base", "together"), ("one", "apart")))
    roles = find_roles(base.config, {**model.tensors, **base.tensors})
    seen, _ = as_stored(model, "one", base, roles)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = open_checkpoint(models["one", "together"]).read(name)
    assert torch.equal(seen.read(name), expected)
    reader = Reader(seen, hashing=True)
    places = reader.places([Span(name, (1, 3)), Span(name)])
    rows, whole = reader.read(places, torch.empty(places.nbytes, dtype=torch.uint8))
    assert torch.equal(rows.tensor(), expected[1:3])
    assert torch.equal(whole.tensor(), expected)
    assert all(
        hashed.sha256 == stored_hashes(path)[tensor]
        for path, read in reader.hashes().items()
        for tensor, hashed in read.tensors.items()
    )
    assert {tensor for read in reader.hashes().values() for tensor in read.tensors} == {
        f"model.layers.1.mlp.experts.{i}.{side}_proj.weight" for i in range(4) for side in ("gate", "up")
    }
    reader.close()


def test_a_mixture_that_lacks_a_matrix_is_refused_and_none_of_it_is_given_up(
    models: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    weights = load_folder(models["one", "apart"])
    del weights["model.layers.0.mlp.experts.3.up_proj.weight"]
    write_checkpoint(tmp_path / "broken", weights)
    with pytest.raises(
        acemerge.CheckpointError, match=r"lacks tensor .*gate_up_proj.* and has .*experts\.0.*, which the base lacks"
    ) as refused:
        acemerge.merge(models["base", "together"], [tmp_path / "broken"], "average", out=tmp_path / "out")
    assert "action: base" not in str(refused.value)
