"""The packs of the papers' experiments, from a small Hub with their repositories to the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paper_hub
import pytest
import torch
from commands import failed, run
from hub_server import FakeHub
from paper_hub import PaperHub

import acemerge
from acemerge.cli.text import stderr
from acemerge.errors import UsageError
from acemerge.evaluation.evaluate import Run
from acemerge.evaluation.tables import EXPERTS, Evaluation, Row, Score
from acemerge.output.verify import verify
from acemerge.reproduction.comparison import compare, markdown
from acemerge.reproduction.inputs import find_inputs
from acemerge.reproduction.pack import MEAN, OF_EXPERTS, PACKS, Pack, load_pack, recipes_of, tasks_of
from acemerge.reproduction.scores import kept_in
from acemerge.tasks.task_file import Tasks

ALL = [(name, size) for name in PACKS for size in (load_pack(name, None).sizes or [None])]
ALL += [("vit", "b32"), ("vit", "l14")]


@pytest.fixture
def paper(hub: FakeHub, tmp_path: Path) -> PaperHub:
    (tmp_path / "saved").mkdir()
    return PaperHub(hub, tmp_path / "saved")


# --- the packs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), ALL)
def test_a_pack_makes_recipes_and_tasks(name: str, size: str | None) -> None:
    pack = load_pack(name, size)
    places = {model: model for model in pack.models}
    recipes = recipes_of(pack, list(pack.rules), places)
    assert all(recipe.policy == "paper" and len(recipe.experts) == len(pack.experts) for recipe in recipes.values())
    tasks = tasks_of(pack, pack.task_names, places, dict.fromkeys(pack.task_names, "data"), None)
    assert [task.name for task in tasks.tasks] == pack.task_names
    assert [task.expert for task in tasks.tasks] == [pack.experts[name] for name in pack.task_names]
    assert len({task.head for task in tasks.tasks}) == len(tasks.tasks)
    assert not any("{" in model for model in places)


def test_a_wrong_copy_of_a_published_table_is_found() -> None:
    """The mean that a source gives is that of what was copied, as near as numbers of one decimal can tell."""
    checked = 0
    for name, size in ALL:
        pack = load_pack(name, size)
        for row in pack.published:
            if set(row.scores) == {*pack.task_names, MEAN}:
                assert row.scores[MEAN] == pytest.approx(np.mean([row.scores[t] for t in pack.task_names]), abs=0.1)
                checked += 1
    assert checked == 19


def test_the_parameters_are_the_papers() -> None:
    eps = {name: load_pack(name, None).rules["ace"]["method"]["eps"] for name in PACKS}
    assert eps == {"vit": 1e-5, "roberta": 2e-4, "gpt2": 4e-2, "llama": 1e-5}


# --- whole runs ---------------------------------------------------------------------------------------------


def _words(name: str, *more: str) -> list[str]:
    return ["reproduce", name, "-o", "out", "--yes", *more]


def _table(file: str = "reproduction.json") -> dict[str, Any]:
    return dict(json.loads(Path("out", file).read_text()))


def test_gpt2_from_the_hub_to_the_table(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    pack = load_pack("gpt2", None)
    paper_hub.put_gpt2(paper, pack)
    code, printed, errors = run(capsys, *_words("gpt2", "--methods", "average,ace", "--tasks", "cola,mnli"))
    assert code == 0, errors
    assert "A subset: 2 of 7 tasks." in printed

    asked = {
        line.split("/resolve/")[1].split("/", 1)[1]
        for line in paper.hub.asked
        if "/datasets/" in line and "/resolve/" in line
    }
    assert asked == {
        f"{task}-0000{i}-of-00002.parquet" for task in ("cola/validation", "mnli/validation_matched") for i in (0, 1)
    }

    found, evaluation = _table(), _table("evaluation.json")["rows"]
    assert list(evaluation) == ["experts", "base", "average", "ace"]
    lines = {(line["row"], line["task"]): line for line in found["lines"]}
    assert set(lines) == {(row, task) for row in evaluation for task in ("cola", "mnli")}
    line = lines["ace", "mnli"]
    assert (line["published"], line["source"]) == (69.9, "paper")
    assert line["ours"] == 100 * evaluation["ace"]["tasks"]["mnli"]["score"]
    assert line["difference"] == line["ours"] - 69.9
    assert evaluation["ace"]["tasks"]["mnli"]["head"] == "heads/gpt2_mnli.safetensors"
    text = Path("out/reproduction.md").read_text()
    assert "**A subset: 2 of 7 tasks.**" in text
    assert f"| ace | mnli | 69.9 | {line['ours']:.1f} [" in text
    assert f"tanganke/gpt2_rte at {paper.hub.repositories['tanganke/gpt2_rte'].refs['main']}" in text

    experts = [f"tanganke/gpt2_{task}" for task in pack.experts]
    acemerge.merge("openai-community/gpt2", experts, "ace", out="direct", policy="paper", eps=0.04)
    assert Path("direct/model.safetensors").read_bytes() == Path("out/merged/ace/model.safetensors").read_bytes()


def test_a_run_goes_on_behind_its_last_score(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    """With the commits of its beginning, and without asking anybody for what it has."""
    paper_hub.put_gpt2(paper, load_pack("gpt2", None))
    code, _, errors = run(capsys, *_words("gpt2", "--methods", "average", "--tasks", "cola,rte"))
    assert (code, errors.count("12 done")) == (0, 6)  # base, expert and merge on two tasks
    first = _table("evaluation.json")["rows"]
    paper.hub.repositories["tanganke/gpt2_cola"].commit({"config.json": b"moved on"})
    paper.hub.asked.clear()
    next(iter(Path("out/scores").iterdir())).write_bytes(b"half of it")
    code, _, errors = run(capsys, *_words("gpt2", "--methods", "average", "--tasks", "cola,rte"))
    assert (code, errors.count("12 done")) == (0, 1)
    assert paper.hub.asked == []
    assert errors.startswith("merging by average\n")
    again = _table("evaluation.json")["rows"]
    assert {row: again[row]["mean"] for row in again} == {row: first[row]["mean"] for row in first}


def test_roberta_from_folders_of_one_repository(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    paper_hub.put_roberta(paper, load_pack("roberta", None))
    code, _, errors = run(capsys, *_words("roberta", "--methods", "ace", "--tasks", "mnli,stsb", "--limit", "9"))
    assert code == 0, errors
    rows = _table("evaluation.json")["rows"]
    assert {score["examples"] for row in rows.values() for score in row["tasks"].values()} == {9}
    assert set(rows["ace"]["tasks"]["stsb"]["metrics"]) == {"pearson", "spearman"}
    assert rows["ace"]["tasks"]["mnli"]["head"] == "heads/6-roberta-base_lr1e-05.safetensors"
    assert _table()["lines"] == []
    text = Path("out/reproduction.md").read_text()
    assert "2 of 8 tasks, at most 9 examples of each" in text
    assert "Nothing that was published stands beside these scores." in text
    inputs = verify("out/merged/ace")["inputs"]
    assert inputs[1]["path"].endswith(":cola/roberta-base_lr1e-05")


def test_vit_with_a_base_of_pickled_weights(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    paper_hub.put_vit(paper, load_pack("vit", "b32"))
    capsys.readouterr()  # what the libraries said while the models were made
    words = _words("vit", "--size", "b32", "--methods", "ace,task_arithmetic", "--tasks", "eurosat")
    failed(run(capsys, *words), 3, "openai/clip-vit-base-patch32: has only pickled weights.*--allow-pickle")
    code, _, errors = run(capsys, *words, "--allow-pickle")
    assert code == 0, errors
    assert [(line["row"], line["published"]) for line in _table()["lines"]] == [
        ("base", 46.0), ("experts", 99.0), ("task_arithmetic", 76.7)
    ]  # fmt: skip
    merged = verify("out/merged/ace")["tensors"]
    assert merged["vision_model.encoder.layers.0.mlp.fc1.weight"]["rule"] == "ace"
    assert merged["text_model.encoder.layers.0.mlp.fc1.weight"]["status"] == "kept"
    # What FusionBench applies to every tensor of the vision half is applied to those of one dimension, too.
    assert {
        t["rule"]
        for n, t in verify("out/merged/task_arithmetic")["tensors"].items()
        if n.startswith("vision_model.") and t["status"] == "ok"
    } == {"task_arithmetic"}


def test_llama_has_perplexities_and_nothing_published(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    paper_hub.put_llama(paper, load_pack("llama", None))
    code, printed, errors = run(capsys, *_words("llama", "--methods", "average", "--tasks", "coding", "--limit", "6"))
    assert code == 0, errors
    assert "published beside ours" in printed
    assert _table("evaluation.json")["rows"]["average"]["tasks"]["coding"]["metrics"]["perplexity"] > 1
    assert _table()["lines"] == []


# --- before anything is fetched -----------------------------------------------------------------------------


def test_nothing_is_fetched_unasked(
    paper: PaperHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    pack = load_pack("gpt2", None)
    paper_hub.put_gpt2(paper, pack)
    inputs = find_inputs(pack, ["cola"], None, allow_pickle=False)
    held = paper.hub.repositories
    assert {entry.name: entry.nbytes for entry in inputs if entry.what == "model"} == {
        model: sum(map(len, held[model].head.values())) for model in pack.models
    }
    cola = [held["datasets/nyu-mll/glue"].head[f"cola/validation-0000{i}-of-00002.parquet"] for i in (0, 1)]
    assert (inputs[-1].name, inputs[-1].nbytes) == ("nyu-mll/glue cola validation", sum(map(len, cola)))
    assert [entry.to_fetch() for entry in inputs] == [entry.nbytes for entry in inputs]
    code, printed, _ = run(capsys, "reproduce", "gpt2", "--dry-run", "--tasks", "cola")
    assert code == 0
    assert "nyu-mll/glue cola validation" in printed
    code, _, errors = run(capsys, "reproduce", "gpt2", "-o", "out", "--quiet")
    assert code == 2
    assert "would be fetched; add --yes if they may be" in errors
    monkeypatch.setattr(stderr(), "_force_terminal", True)
    monkeypatch.setattr("typer.confirm", lambda question, err: questions.append(question))
    code, _, errors = run(capsys, "reproduce", "gpt2", "-o", "out", "--quiet")
    assert (code, errors) == (0, "nothing was fetched\n")
    total = sum(entry.nbytes for entry in find_inputs(pack, pack.task_names, None, allow_pickle=False))
    assert questions == [f"Fetch {total / 1000:.1f} kB?"]
    assert paper.hub.fetched == set()
    assert not Path("out").exists()


def test_a_data_set_that_has_changed_is_named(paper: PaperHub, capsys: pytest.CaptureFixture[str]) -> None:
    paper_hub.put_gpt2(paper, load_pack("gpt2", None))
    paper.hub.repositories["datasets/nyu-mll/glue"].commit({"README.md": b""})
    capsys.readouterr()
    failed(run(capsys, *_words("gpt2")), 3, "data set nyu-mll/glue: has no files cola/validation-.*parquet")
    del paper.hub.repositories["datasets/nyu-mll/glue"]
    failed(run(capsys, *_words("gpt2")), 3, "nyu-mll/glue: no such folder here, and no such data set on the Hub")


WRONG = {
    "gpt": "did you mean `gpt2`",
    "gpt2 --size b16": "has no such size; leave --size out",
    "vit --size b31": "did you mean `b32`",
    "gpt2 --methods acee": "--methods: the pack has no 'acee'; did you mean `ace`",
    "gpt2 --tasks stsb": "--tasks: the pack has no 'stsb'",
    "gpt2": "-o is missing",
    "gpt2 --limit 0 -o out": "limit",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_commands(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed(run(capsys, "reproduce", *words.split()), 2, WRONG[words])


def test_inputs_that_are_not_ours_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text("[{}]")
    with pytest.raises(UsageError, match="is not what acemerge wrote; remove it"):
        find_inputs(load_pack("gpt2", None), ["cola"], tmp_path, allow_pickle=False)


# --- parts --------------------------------------------------------------------------------------------------


def _score(task: str, value: float) -> Score:
    return Score(task, value, {"accuracy": value}, np.array([value - 0.02, value + 0.02]), {"examples": 5})


def _evaluation(tasks: list[str]) -> Evaluation:
    rows = [Row(EXPERTS, tuple(_score(t, 0.8) for t in tasks)), Row("ace", tuple(_score(t, 0.7) for t in tasks))]
    return Evaluation(tuple(tasks), tuple(rows))


def test_means_are_compared_over_all_tasks_only() -> None:
    pack = load_pack("gpt2", None)
    content = pack.model_dump()
    content["published"] = [{"source": "paper", "row": "ace", "scores": {"cola": 75.0, MEAN: 60.0, OF_EXPERTS: 90.0}}]
    pack = Pack.model_validate(content)
    (line,) = compare(_evaluation(["cola"]), pack)
    assert (line.row, line.task) == ("ace", "cola")
    assert line.difference == pytest.approx(-5)
    assert line.interval == pytest.approx((68.1, 71.9))
    lines = {line.task: line.difference for line in compare(_evaluation(pack.task_names), pack)}
    assert lines == pytest.approx({"cola": -5, MEAN: 10, OF_EXPERTS: -2.5})
    text = markdown(pack, "", compare(_evaluation(["cola"]), pack), _evaluation(["cola"]), ["org/a at 12"])
    assert "| ace | cola | 75.0 | 70.0 [68.1, 71.9] | -5.0 | paper |" in text
    assert "subset" not in text


def test_a_score_is_kept_for_what_it_is_of(tmp_path: Path) -> None:
    made: list[str] = []

    def score(model: Any, task: Any, run: Any, row: str) -> Score:
        made.append(row)
        return replace(_score(task.name, 0.1 + 0.2), draws=np.array([1 / 3, 0.1]))

    class Folder:
        name, path = "org/a@1", tmp_path / "nowhere"

    def tasks(**changes: Any) -> Run:
        task = {"kind": "classification", "name": "cola", "data": "a.tsv", "text": "a", "label": "b", **changes}
        return Run(Tasks.model_validate({"tasks": [task]}), torch.device("cpu"))

    ask: Callable[..., Score] = kept_in(tmp_path / "scores", score)
    first, run_ = ask(Folder, tasks().tasks.tasks[0], tasks(), "ace"), tasks(limit=3)
    again = ask(Folder, tasks().tasks.tasks[0], tasks(), "ace")
    assert made == ["ace"]
    assert (again.score, again.draws.tolist(), again.about) == (first.score, first.draws.tolist(), first.about)
    ask(Folder, run_.tasks.tasks[0], run_, "ace")
    ask(Folder, tasks().tasks.tasks[0], tasks(), "ties")
    Folder.name = "org/a@2"
    ask(Folder, tasks().tasks.tasks[0], tasks(), "ties")
    assert made == ["ace", "ace", "ties", "ties"]
