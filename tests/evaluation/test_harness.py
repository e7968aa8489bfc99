"""Tasks of lm-evaluation-harness in the same table: a stand-in of its interface, and the real one where it is there.

The extra `lm` is too heavy for every run of the tests: `pip install 'acemerge[lm]'` first, and the last test runs too.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_model
from task_builders import ROOM, WORDS, save_model, save_tokenizer, sentences, sharpened, write_tasks

from acemerge.errors import UsageError
from acemerge.evaluation import harness
from acemerge.evaluation.evaluate import Run, evaluate
from acemerge.evaluation.metrics import bootstrap
from acemerge.evaluation.tables import Score, mean
from acemerge.tasks.harness_file import read_task
from acemerge.tasks.task_file import load_tasks

CPU = torch.device("cpu")
HITS = [1.0, 0.0, 1.0, 1.0, 0.0]
LENGTHS = [(-3.0, 2), (-8.0, 4), (-1.0, 1), (-2.0, 1), (-9.0, 3)]


class Task:
    """As `lm_eval.api.task.ConfigurableTask` is used here."""

    def __init__(self, name: str) -> None:
        self.task_name = name

    def aggregation(self) -> dict[str, Any]:
        def word_perplexity(items: list[tuple[float, int]]) -> float:
            return float(np.exp(-sum(loss for loss, _ in items) / sum(count for _, count in items)))

        return {"acc": np.mean, "loss": np.mean, "word_perplexity": word_perplexity}


class Manager:
    """As `lm_eval.tasks.TaskManager`."""

    all_tasks = ("pets", "many", "fetching")

    def __init__(self, include_defaults: bool) -> None:
        self.all_tasks = Manager.all_tasks if include_defaults else ()

    def load(self, specs: list[str | dict[str, Any]]) -> dict[str, Any]:
        (spec,) = specs
        name = spec if isinstance(spec, str) else spec["task"]
        if name == "fetching":
            try:
                sys.modules["evaluate"].load("bleurt")
            except Exception:  # as the harness: a metric that is not there is a line in its log
                return {"tasks": {}}
        names = [f"{name}_{i}" for i in range(57)] if name == "many" else [name]
        return {"tasks": {name: Task(name) for name in names}}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Modules with the harness's names, and what they were asked."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> Mapping[str, Any]:
        asked.append(given)
        (task,) = given["tasks"]
        samples = [
            {"filter": kept, "acc": hit if kept == "none" else 1.0, "loss": -hit, "word_perplexity": length}
            for kept in ("none", "strict")
            for hit, length in zip(HITS, LENGTHS, strict=True)
        ]
        numbers = {
            "alias": "a", "acc,none": 0.6, "acc_stderr,none": 0.2, "acc,strict": 1.0, "loss,none": -0.6,
            "word_perplexity,none": float(np.exp(23 / 11)), "word_perplexity_stderr,none": "N/A",
        }  # fmt: skip
        better = {"acc": True, "loss": False, "word_perplexity": False}
        name = task.task_name
        return {
            "results": {name: numbers}, "samples": {name: samples}, "higher_is_better": {name: better},
            "n-shot": {name: given["num_fewshot"] or 0},
        }  # fmt: skip

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "evaluate")}
    modules["lm_eval.models.huggingface"] = ModuleType("lm_eval.models.huggingface")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    root: Any = modules["lm_eval"]
    root.simple_evaluate, root.tasks, root.models = simple_evaluate, modules["lm_eval.tasks"], modules["lm_eval.models"]
    root.tasks.TaskManager = Manager
    root.models.huggingface = SimpleNamespace(HFLM=lambda **given: given)
    sys.modules["evaluate"].load = lambda name: pytest.fail(f"{name} was fetched")  # type: ignore[attr-defined]
    harness._manager.cache_clear()
    yield asked
    harness._manager.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    network = sharpened(make_model("gpt2", n_positions=ROOM["max_position_embeddings"]), 0)
    save_tokenizer(save_model(tmp_path / "model", network), 30, eos_token="[SEP]")
    return tmp_path / "model"


def scored(model: Path, **keys: Any) -> Score:
    tasks = load_tasks(write_tasks(model.parent, {"name": "x", "kind": "lm_eval", **keys}, resamples=200))
    (found,) = evaluate({"m": str(model)}, Run(tasks, CPU)).rows[-1].known()
    return found


def test_the_score_is_the_harness_s_and_its_interval_ours(model: Path, stand_in: list[dict[str, Any]]) -> None:
    found = scored(model, task="pets", few_shot=3, limit=5, batch_size=2, chat_template=True)
    assert (found.score, found.is_perplexity) == (0.6, False)
    seed = Run(load_tasks(model.parent / "tasks.yaml"), CPU).seed(load_tasks(model.parent / "tasks.yaml").tasks[0])
    hits = np.array(HITS)
    assert found.draws.tolist() == bootstrap(lambda rows: float(hits[rows].mean()), 5, 200, seed).tolist()
    assert {key: found.about[key] for key in ("examples", "metric", "few_shot", "limit")} == {
        "examples": 5, "metric": "acc,none", "few_shot": 3, "limit": 5,
    }  # fmt: skip
    (asked,) = stand_in
    assert (asked["num_fewshot"], asked["limit"], asked["apply_chat_template"]) == (3, 5, True)
    assert asked["confirm_run_unsafe_code"] is False
    assert asked["model"]["trust_remote_code"] is False
    assert isinstance(asked["model"]["pretrained"], torch.nn.Module)  # nothing is loaded by a name


def test_metric_and_filter_are_chosen_by_name(model: Path, stand_in: list[dict[str, Any]]) -> None:
    assert scored(model, task="pets", filter="strict").score == 1.0
    words = scored(model, task="pets", metric="word_perplexity")
    assert (words.score, words.is_perplexity) == (pytest.approx(np.exp(23 / 11)), True)
    assert words.draws.min() < words.score < words.draws.max()
    for keys, message in (
        ({"task": "pets", "metric": "ac"}, "no metric 'ac' for pets; did you mean `acc`"),
        ({"task": "pets", "filter": "loose"}, "no filter 'loose'"),
        ({"task": "pets", "metric": "loss"}, "of loss less is better"),
        ({"task": "pet"}, "no task 'pet'; did you mean `pets`"),
        ({"task": "../pets"}, "no task '../pets'"),
        ({"task": "quite another"}, "name one that `lm-eval ls tasks` lists"),
        ({"task": "many"}, "'many' is 57 tasks of lm_eval; list them one by one: many_0"),
        ({"task": "fetching"}, "its metric 'bleurt' is a program on the Hub, which is not run"),
    ):
        with pytest.raises(UsageError, match=message):
            scored(model, **keys)


def test_without_the_harness_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"lm_eval: is not installed; pip install 'acemerge\[lm\]'"):
        scored(model, task="pets")


# --- tasks in files ------------------------------------------------------------------------------------------

PETS = {
    "task": "pets",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}} and",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(root: Path, **changes: Any) -> Path:
    path = root / "pets.yaml"
    path.write_text(json.dumps(PETS | changes))  # which is YAML, too
    return path


def test_a_task_in_a_file_is_data_relative_to_it(tmp_path: Path) -> None:
    found = read_task(write_task(tmp_path))
    assert found["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "test.jsonl")}}
    assert read_task(write_task(tmp_path, dataset_path="org/data", dataset_kwargs={}))["dataset_kwargs"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_docs": "utils.process"}, "the key 'process_docs' is not read here"),
        ({"include": "other.yaml"}, "the key 'include'"),
        ({"unsafe_code": True}, "the key 'unsafe_code'"),
        ({"custom_dataset": "utils.load"}, "the key 'custom_dataset'"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "'doc_to_text' holds more than columns"),
        ({"doc_to_choice": ["{% for x in y %}", "b"]}, "'doc_to_choice.0' holds more"),
        ({"description": "{# #}"}, "'description' holds more"),
        ({"metric_list": [{"metric": "bleurt", "hf_evaluate": True}]}, "the key 'hf_evaluate' of a metric"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "holds more than `data_files`"),
        ({"dataset_path": "./script.py"}, "Hub; write `dataset_path:` as one of json, csv, parquet"),
        ({"task": None}, "the key 'task' is missing"),
    ],
)
def test_what_would_be_code_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_task(write_task(tmp_path, **changes))


def test_functions_in_a_file_are_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text("task: pets\ndoc_to_text: !function utils.text\n")
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_task(tmp_path / "pets.yaml")
    assert not (tmp_path / "ran").exists()


# --- the real one --------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm")
def test_the_harness_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices by their likelihood, beside the model asked directly; generated words; a perplexity."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(model.parent / "cache"))
    texts, choices = sentences(12, seed=1), ["the cat", "a dog"]
    rows = [{"text": text, "choices": choices, "answer": i % 2, "gold": WORDS[i]} for i, text in enumerate(texts)]
    (model.parent / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(model.parent)
    found = scored(model, task="pets.yaml", batch_size=4)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    hits = []
    for row in rows:
        losses = []
        for choice in choices:
            before, whole = (tokenizer(t, add_special_tokens=False)["input_ids"]
                             for t in (f"{row['text']} and", f"{row['text']} and {choice}"))  # fmt: skip
            with torch.no_grad():
                logs = network(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            losses.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        hits.append(float(np.argmax(losses) == row["answer"]))
    assert found.score == pytest.approx(np.mean(hits))
    generating = {"output_type": "generate_until", "doc_to_target": "gold", "doc_to_choice": None}
    generating |= {"metric_list": [{"metric": "exact_match"}]}
    generating |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False}}
    write_task(model.parent, **generating)
    assert 0 <= scored(model, task="pets.yaml", limit=4).score <= 1
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "doc_to_choice": None,
    }
    write_task(model.parent, **rolling, metric_list=[{"metric": "word_perplexity"}])
    tasks = load_tasks(model.parent / "tasks.yaml")
    row = evaluate({"m": str(model)}, Run(tasks, CPU)).rows[-1]
    assert row.known()[0].is_perplexity
    assert mean(row) is None
