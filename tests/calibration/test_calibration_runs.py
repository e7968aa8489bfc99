"""Calibration that is stopped, gone on with, planned, compared, or refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder, write_adapter
from calibrated_family import EXPERTS, merge
from commands import failed, run
from task_builders import sentences, write_tasks, write_tsv

import acemerge
from acemerge.calibration import calibrate
from acemerge.engine import writing
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.manifest import load_manifest
from acemerge.recipes.recipe import load_recipe
from acemerge.tasks.task_file import load_tasks


@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_a_run_that_was_stopped_goes_on_with_what_was_measured(
    family: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(family, method, "whole")
    asked: list[str] = []
    name = "second_moments" if method == "regmean" else "block_moments"
    measure = getattr(calibrate, name)

    def counted(model: Any, *rest: Any) -> Any:
        asked.append(model.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(model, *rest)

    monkeypatch.setattr(calibrate, name, counted)
    with pytest.raises(KeyboardInterrupt):
        merge(family, method)
    merge(family, method, resume=True)
    assert asked[0] not in asked[1:3]
    whole, resumed = (load_folder(family / folder) for folder in ("whole", "out"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    write_tsv(family / "tone.tsv", {"s": sentences(6, seed=5)})
    with pytest.raises(UsageError, match="finished merge of another run"):
        merge(family, method, resume=True)


def test_stopped_runs_do_not_go_on_with_other_data(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "second_moments", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(family, "regmean")
    write_tsv(family / "tone.tsv", {"s": sentences(6, seed=5)})
    with pytest.raises(UsageError, match="cannot go on: calibration tone mood sha256 was"):
        merge(family, "regmean", resume=True)


def test_a_dry_run_computes_the_same_and_leaves_nothing(family: Path) -> None:
    tasks, experts = family / "tasks.yaml", [family / name for name in EXPERTS]
    before = sorted(family.rglob("*"))
    dry = acemerge.merge(family / "base", experts, "fisher", calibration=tasks)
    assert sorted(family.rglob("*")) == before
    written = merge(family, "fisher")
    assert dry.manifest["calibration"] == written.manifest["calibration"]


def words(root: Path, *more: object) -> list[object]:
    return ["--base", root / "base", "--expert", root / "topic", "--expert", root / "tone", *more]


def test_the_plan_says_who_is_calibrated_on_what(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = family / "tasks.yaml"
    code, out, _ = run(capsys, "plan", *words(family, "--method", "regmean", "--calibration", tasks))
    assert code == 0
    assert "expert tone: to be calibrated on mood" in out
    code, out, _ = run(capsys, "plan", *words(family, "--calibration", tasks))
    assert "warning: calibration: no rule of this merge asks for it" in out


def test_rules_with_and_without_data_are_compared(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (family / "test").mkdir()
    task = {"kind": "classification", "name": "topic", "data": "../topic.tsv", "text": "s", "label": "y"}
    tasks = write_tasks(family / "test", task)
    more = ["--methods", "average,regmean", "--calibration", family / "tasks.yaml", "--tasks", tasks]
    code, out, err = run(capsys, "compare", *words(family, *more, "-o", family / "out"))
    assert code == 0, err
    assert all(name in out for name in ("average", "regmean"))
    assert load_manifest(family / "out/merged/regmean")["calibration"].keys() == EXPERTS.keys()


def test_what_is_missing_is_one_line_with_its_cure(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["merge", *words(family, "--method", "regmean", "-o", family / "out")]
    failed(
        run(capsys, *ask),
        2,
        "method regmean: needs calibration data; name tasks .* by --calibration TASKS.yaml, or .* self",
    )
    failed(run(capsys, *ask, "--calibration", "nowhere.yaml"), 2, "nowhere.yaml: no such file")
    ask += ["--calibration", family / "tasks.yaml"]
    write_tasks(family, {"kind": "classification", "name": "topic", "data": "topic.tsv", "text": "s", "label": "y"})
    failed(run(capsys, *ask), 2, "no task belongs to expert tone; add one with `expert: .*tone`, or with `head: tone`")
    monkeypatch.setitem(sys.modules, "transformers", None)
    write_tasks(family, *({"kind": "regression", "name": n, "data": "tone.tsv", "text": "s"} for n in EXPERTS))
    failed(run(capsys, *ask), 2, r"transformers: is not installed; pip install 'acemerge\[hf\]'")
    assert not (family / "out").exists()


def test_tasks_without_labels_cannot_be_scored(family: Path) -> None:
    with pytest.raises(UsageError, match=r"'tasks.1.classification.label' is missing; add it"):
        load_tasks(family / "tasks.yaml")


def test_a_recipe_names_its_calibration_beside_itself(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (family / "sub").mkdir()
    (family / "sub/recipe.yaml").write_text(
        "{method: regmean, base: ../base, experts: [../topic, ../tone], calibration: ../tasks.yaml}"
    )
    monkeypatch.chdir(family.parent)
    opened = open_recipe(load_recipe(family / "sub/recipe.yaml", {}), None, RunOptions())
    assert opened.plan.calibration == {"topic": ("topic",), "tone": ("mood",)}


def test_what_cannot_be_run_is_refused(family: Path) -> None:
    adapter = write_adapter(
        family / "lora", {"roberta.encoder.layer.0.intermediate.dense": (torch.ones(1, 16), torch.ones(24, 1))}
    )
    write_tasks(family, {"kind": "regression", "name": "lora", "data": "tone.tsv", "text": "s"})
    with pytest.raises(UsageError, match=r"expert lora: is an adapter .*; merge it into its base alone by"):
        acemerge.merge(family / "base", [adapter], "regmean", calibration=str(family / "tasks.yaml"))
    write_tasks(
        family, {"kind": "images", "name": "topic", "data": "."}, {"kind": "images", "name": "tone", "data": "."}
    )
    with pytest.raises((UsageError, CheckpointError)):
        merge(family, "regmean")
    assert not (family / "out").exists()


def test_the_expert_that_is_advised_is_found_from_where_the_task_file_lies(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path on the command line is relative to where the command is run, one in a task file to that file."""
    monkeypatch.chdir(family)
    (family / "of").mkdir()
    task = {"kind": "classification", "data": str(family / "topic.tsv"), "text": "s"}
    write_tasks(family / "of", {**task, "name": "topic"})
    ask = ["plan", "--base", "base", "--expert", "./topic", "--expert", "./tone", "--method", "regmean"]
    ask += ["--calibration", "of/tasks.yaml"]
    told = run(capsys, *ask)
    found = re.search(r"add one with `expert: (.*?)`", told[2])
    assert found, told
    write_tasks(family / "of", {**task, "name": "topic"}, {**task, "name": "other", "expert": found[1]})
    assert run(capsys, *ask)[0] == 0


def test_a_calibrated_run_goes_on_with_inputs_that_were_put_back(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement is of the whole file, though the merge has read but the beginning of it."""
    merge(family, "regmean", "whole")
    real, done = writing.TensorFiles.end_of_tensor, []

    def stopped(self: Any, names: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(names)
        return real(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(writing.TensorFiles, "end_of_tensor", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge(family, "regmean", "out")
    weights = family / "tone/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # far behind what was merged
    with pytest.raises(UsageError, match=r"tone model\.safetensors was written to"):
        merge(family, "regmean", "out", resume=True)
    weights.write_bytes(content)
    merge(family, "regmean", "out", resume=True)
    assert (family / "out/model.safetensors").read_bytes() == (family / "whole/model.safetensors").read_bytes()
