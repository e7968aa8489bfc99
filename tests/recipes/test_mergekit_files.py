"""Files of mergekit's other commands, and what a recipe's file may say beside its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from builders import PlainModel
from commands import run
from mergekit_shelf import LLAMA, llama_tensors, model

from acemerge.errors import UsageError
from acemerge.recipes.recipe import load_recipe

LINEAR = {"merge_method": "linear", "models": [model("a", weight=1), model("b", weight=3)]}


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Two models as pickles, `a` and `b`."""
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        tensors = {key: value + i for key, value in llama_tensors(layers=2).items()}
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 2}))
    return tmp_path


def _refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UsageError) as failure:
        load_recipe(path, {})
    return str(failure.value)


def test_a_name_changes_nothing(shelf: Path) -> None:
    (shelf / "named.yml").write_text(yaml.safe_dump({"name": "blend-v2", **LINEAR}))
    (shelf / "plain.yml").write_text(yaml.safe_dump(LINEAR))
    assert load_recipe(shelf / "named.yml", {}) == load_recipe(shelf / "plain.yml", {})


def test_files_of_other_commands_are_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    several = yaml.safe_dump_all([{"name": "core", **LINEAR}, {"merge_method": "slerp", "base_model": "core"}])
    assert "holds several documents, as files of mergekit-multi do" in _refusal(path, several)
    mixture = {"base_model": "a", "gate_mode": "hidden", "experts": [{"source_model": "a", "positive_prompts": ["x"]}]}
    for some in (mixture, {key: mixture[key] for key in ("base_model", "experts")}):
        assert "is a file of mergekit-moe" in _refusal(path, yaml.safe_dump(some))
    assert "not valid YAML" in _refusal(path, "a: *nobody")


def test_pickles_are_read_where_values_depend_on_their_headers(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gradient = {**LINEAR, "models": [model("a", weight=[0, 1]), model("b", weight=1)]}
    (shelf / "r.yml").write_text(yaml.safe_dump(gradient))
    words = ["merge", shelf / "r.yml", "-o", shelf / "out", "--force"]
    code, _, said = run(capsys, *words)
    assert (code, "--allow-pickle" in said) == (3, True)
    code, _, said = run(capsys, *words, "--allow-pickle")
    assert code == 0, said


def test_calibration_in_the_home_folder_is_found_there(
    plain: PlainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = plain.save()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = {"base": str(base), "experts": [str(experts[0])], "method": "regmean", "calibration": "~/tasks.yaml"}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    assert load_recipe(tmp_path / "r.yml", {}).calibration == str(tmp_path / "home/tasks.yaml")
    (tmp_path / "r.yml").write_text(yaml.safe_dump({**recipe, "calibration": "tasks.yaml"}))
    assert load_recipe(tmp_path / "r.yml", {}).calibration == str(tmp_path / "tasks.yaml")


def test_a_key_where_no_key_goes_gets_a_cure(shelf: Path) -> None:
    wrong = {"merge_method": "slerp", "base_model": "a", "models": [model("a", t=0.5), model("b")]}
    said = _refusal(shelf / "r.yml", yaml.safe_dump(wrong))
    assert "models.0: unknown key 't'; a model has no parameters here: write it under the recipe's `parameters`" in said
