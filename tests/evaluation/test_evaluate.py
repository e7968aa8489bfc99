"""Text tasks end to end: which head, which examples, which score, and the two commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_model, write_adapter
from commands import failed, run
from safetensors.torch import load_file, save_file
from stores import FaultyClient
from task_builders import (
    ROOM,
    save_encoder,
    save_family,
    save_model,
    save_tokenizer,
    sentences,
    sharpened,
    undecided,
    write_tasks,
    write_tsv,
)

import acemerge
from acemerge.engine import opening
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.evaluation.compare import by_methods, merge_all, with_experts
from acemerge.evaluation.evaluate import Run, evaluate
from acemerge.evaluation.tables import Score
from acemerge.planning.planner import make_plan
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.tasks.heads import find_heads
from acemerge.tasks.networks import open_model, pooled
from acemerge.tasks.predict import encode, score, text_batches
from acemerge.tasks.task_file import load_tasks

CPU = torch.device("cpu")
TEXTS, OTHERS = sentences(41, seed=1), sentences(41, seed=2)


def scores(model: Path, tasks: Path) -> list[Score]:
    return evaluate({"model": str(model)}, Run(load_tasks(tasks), CPU)).rows[-1].known()


def logits_one_by_one(folder: Path, network: Any, *texts: list[str]) -> torch.Tensor:
    """Each example alone, in its own length: no batch, no padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(*row, return_tensors="pt") for row in zip(*texts, strict=True)]
    with torch.no_grad():
        return torch.cat([network(**row) for row in rows])


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base, `topic` in three classes and `tone` in two."""
    return save_family(tmp_path, {"topic": 3, "tone": 2}, base_rows=5)


def test_texts_are_padded_where_the_tokenizer_has_nothing_for_it(tmp_path: Path) -> None:
    """As GPT-2's: every answer is that of the text alone."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = {**make_model("gpt2").config.to_dict(), "num_labels": 3, "pad_token_id": None}
    network = sharpened(GPT2ForSequenceClassification(GPT2Config(**config)), 1).eval()
    save_model(tmp_path / "topic", network, pad_token_id=None)
    save_tokenizer(tmp_path / "topic", bare=True)
    logits = logits_one_by_one(tmp_path / "topic", lambda **row: network(**row).logits, TEXTS)
    answers = logits.argmax(1).tolist()
    assert len(set(answers)) > 1
    write_tsv(tmp_path / "topic.tsv", {"s": TEXTS, "y": answers})
    (found,) = scores(tmp_path / "topic", write_tasks(tmp_path, _task("topic", batch_size=41)))
    assert found.score == 1


def _task(name: str, **keys: Any) -> dict[str, Any]:
    return {"kind": "classification", "name": name, "data": f"{name}.tsv", "text": "s", "label": "y", **keys}


def _with_head(body: Path, head: dict[str, torch.Tensor], rows: int) -> Any:
    """The base's RoBERTa with a head put in by hand."""
    state = load_file(body / "model.safetensors") | {k: v for k, v in head.items() if k.startswith("classifier.")}
    network = make_model("roberta", num_labels=rows, **ROOM)
    network.load_state_dict(state)
    return lambda **row: network(**row).logits


def test_a_model_without_a_tokenizer_has_no_score(family: Path) -> None:
    """transformers makes one of special tokens alone, by which every text is the same."""
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(41)]})
    tasks = write_tasks(family, _task("topic"))
    (before,) = scores(family / "topic", tasks)
    for file in list((family / "topic").glob("*token*")):
        file.unlink()
    with pytest.raises(CheckpointError, match="topic: has no tokenizer; put its base's tokenizer files beside"):
        scores(family / "topic", tasks)
    save_tokenizer(family / "topic")
    (after,) = scores(family / "topic", tasks)
    assert after.score == before.score


def test_a_merged_model_with_the_heads_beside_it(family: Path) -> None:
    acemerge.merge(family / "base", [family / "topic", family / "tone"], "average", family / "merged")
    labels = [i % 3 for i in range(41)]
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": labels})
    tasks = write_tasks(family, _task("topic", metrics=["accuracy", "matthews"], batch_size=4))
    assert (family / "merged/heads/topic.safetensors").exists()
    (found,) = scores(family / "merged", tasks)
    head = load_file(family / "merged/heads/topic.safetensors")
    predictions = logits_one_by_one(family / "base", _with_head(family / "merged", head, 3), TEXTS).argmax(1).numpy()
    assert len(set(predictions)) > 1
    assert found.metrics["accuracy"] == np.mean(predictions == labels)
    assert found.score == pytest.approx(np.mean(list(found.metrics.values())))
    assert found.about["examples"] == 41
    assert "heads/topic.safetensors" in found.about["head"]
    there = r"the model has no heads/topics.safetensors; write `head:` as one of: tone, topic"
    _refused(family, "merged", CheckpointError, there, head="topics")


def test_a_model_in_a_store_scores_as_its_folder(
    family: Path, memory: FaultyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the heads that lie beside it, and with the expert's own in a store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(family / "cache"))
    acemerge.merge(family / "base", [family / "topic", family / "tone"], "average", family / "merged")
    for file in (path for name in ("merged", "tone") for path in (family / name).rglob("*") if path.is_file()):
        memory.held.put(file.relative_to(family).as_posix(), file.read_bytes())
    for task, rows in (("topic", 3), ("tone", 2)):
        write_tsv(family / f"{task}.tsv", {"s": TEXTS, "y": [i % rows for i in range(41)]})
    found, stored = (
        evaluate(
            {"merged": f"{place}/merged"},
            Run(load_tasks(write_tasks(family, _task("topic"), _task("tone", expert=f"{place}/tone"))), CPU),
        )
        for place in (family, "s3://bucket")
    )
    for here, there in zip(found.rows, stored.rows, strict=True):
        for a, b in zip(here.known(), there.known(), strict=True):
            assert (b.score, b.draws.tolist(), b.about["head"]) == (a.score, a.draws.tolist(), a.about["head"])


def test_the_experts_own_head_on_another_body(family: Path) -> None:
    write_tsv(family / "tone.tsv", {"s": TEXTS, "t": OTHERS, "y": ["bad", "good"] * 20 + ["bad"]})
    task = _task("tone", text=["s", "t"], labels=["bad", "good"], expert="tone", metrics=["f1"])
    (found,) = scores(family / "base", write_tasks(family, task))
    network = _with_head(family / "base", load_file(family / "tone/model.safetensors"), 2)
    predictions = logits_one_by_one(family / "base", network, TEXTS, OTHERS).argmax(1)
    labels = torch.tensor([0, 1] * 20 + [0])
    hits = int(((predictions == 1) & (labels == 1)).sum())
    assert found.score == pytest.approx(2 * hits / int((predictions == 1).sum() + (labels == 1).sum()))
    assert found.about["head"] == "expert tone"


def test_the_experts_row_is_the_measure(family: Path) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(41)]})
    write_tsv(family / "tone.tsv", {"s": TEXTS, "y": [i % 2 for i in range(41)]})
    tasks = load_tasks(write_tasks(family, _task("topic", expert="topic"), _task("tone", expert="tone")))
    told: list[tuple[str, int, int]] = []
    found = evaluate({"base": str(family / "base")}, Run(tasks, CPU, lambda *event: told.append(event)))
    experts, base = found.rows
    topic, tone = experts.known()
    alone = evaluate({"topic": str(family / "topic")}, Run(tasks, CPU)).rows[-1].scores[0]
    assert alone is not None
    assert topic.score == alone.score
    assert topic.draws.tolist() == alone.draws.tolist()
    ratios = [a.score / b.score for a, b in zip(base.known(), (topic, tone), strict=True)]
    assert found.as_table()["rows"]["base"]["normalised"]["value"] == pytest.approx(np.mean(ratios))
    assert told[1] == ("experts: topic", 41, 41)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_with_a_linear_head(pooling: str, tmp_path: Path) -> None:
    from transformers import BertModel

    save_encoder(tmp_path / "base", 0)
    save_encoder(tmp_path / "genre", 1, rows=3)
    acemerge.merge(tmp_path / "base", [tmp_path / "genre"], "average", tmp_path / "merged", scale=0.5, force=True)
    model = open_model(str(tmp_path / "merged"), CPU)
    scorer = pooled(model, pooling, find_heads("genre", "genre", model.checkpoint, None))
    tokenizer = model.tokenizer()
    encoded = encode(tokenizer, [TEXTS], None)
    batches = text_batches(tokenizer, encoded)
    found = score(scorer.logits, batches, encoded.lengths, 6, CPU, lambda *_: None)
    encoder = BertModel.from_pretrained(tmp_path / "merged")
    head = load_file(tmp_path / "genre/model.safetensors")

    def network(**row: torch.Tensor) -> torch.Tensor:
        states = encoder(**row).last_hidden_state
        features = states[:, 0] if pooling == "cls" else states.mean(1)
        return features @ head["classifier.weight"].T + head["classifier.bias"]

    assert found == pytest.approx(logits_one_by_one(tmp_path / "base", network, TEXTS).numpy(), abs=1e-5)
    assert (scorer.rows, scorer.head_from) == (3, "heads/genre.safetensors")


def test_a_regression(tmp_path: Path) -> None:
    from scipy.stats import pearsonr, spearmanr

    save_family(tmp_path, {"near": 1}, base_rows=1)
    targets = [len(text) / 10 for text in TEXTS]
    write_tsv(tmp_path / "near.tsv", {"s": TEXTS, "t": OTHERS, "y": targets})
    (found,) = scores(tmp_path / "near", write_tasks(tmp_path, _task("near", kind="regression", text=["s", "t"])))
    network = _with_head(tmp_path / "near", {}, 1)
    values = logits_one_by_one(tmp_path / "near", network, TEXTS, OTHERS)[:, 0].numpy()
    expected = [pearsonr(targets, values).statistic, spearmanr(targets, values).statistic]
    assert [found.metrics["pearson"], found.metrics["spearman"]] == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_and_counted(family: Path) -> None:
    texts = ["red " * n for n in (2, 8, 9, 30)]
    write_tsv(family / "topic.tsv", {"s": texts, "y": [0, 1, 2, 0]})
    (found,) = scores(family / "topic", write_tasks(family, _task("topic", max_length=10)))
    assert found.about["truncated"] == 2
    with pytest.raises(UsageError, match="max_length 21 is over the model's 20"):
        scores(family / "topic", write_tasks(family, _task("topic", max_length=21)))


def _refused(family: Path, model: str, kind: type[Exception], message: str, **keys: Any) -> None:
    tasks = write_tasks(family, _task("topic", **keys))
    with pytest.raises(kind, match=message):
        scores(family / model, tasks)


def test_what_does_not_go_together_is_refused(family: Path) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(41)]})
    _refused(family, "tone", UsageError, "class 2 is over the head's 2 rows")
    _refused(family, "topic", UsageError, "2 labels for a head of 3 rows", labels=["0", "1"])
    _refused(family, "topic", UsageError, "f1 is of two classes", metrics=["f1"])
    _refused(family, "topic", CheckpointError, "'classifier.weight' for its head", pooling="mean")
    encoder = save_model(family / "encoder", make_model("bert", **ROOM).bert)
    _refused(family, encoder.name, CheckpointError, "'classifier.weight' for its head .looked in the model itself")
    write_adapter(family / "lora", {"query": (torch.ones(1, 4), torch.ones(4, 1))}, base_model_name_or_path="../base")
    _refused(family, "lora", UsageError, r"names no base on the Hub; name its base with --base \.\./base")
    _refused(family, "nowhere", CheckpointError, "no such folder")
    config = json.loads((family / "topic/config.json").read_text())
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}, "architectures": ["Mine"]}
    (family / "topic/config.json").write_text(json.dumps(config | code))
    (family / "topic/mine.py").write_text(f"open({str(family / 'ran')!r}, 'w')")
    _refused(family, "topic", CheckpointError, "cannot be loaded by AutoTokenizer|AutoConfig")
    assert not (family / "ran").exists()


def test_scores_that_are_not_finite_are_refused(family: Path) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [0] * 41})
    model = make_model("roberta", 1, num_labels=3, **ROOM)
    model.classifier.out_proj.bias.data[1] = float("nan")
    save_model(family / "topic", model)
    _refused(family, "topic", acemerge.errors.NumericalError, "not finite")


def test_evaluate_and_compare_by_command(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(41)]})
    write_tsv(family / "tone.tsv", {"s": TEXTS, "y": [i % 2 for i in range(41)]})
    tasks = write_tasks(family, _task("topic"), _task("tone"), resamples=100)
    experts = ["--expert", family / "topic", "--expert", family / "tone"]
    words = ["compare", "--base", family / "base", *experts, "--methods", "average,ties"]
    words += ["--tasks", tasks]
    code, printed, errors = run(capsys, *words, "-o", family / "out")
    assert code == 0, errors
    assert all(name in printed for name in ("experts", "base", "average", "ties", "of experts", "evaluation.png"))
    assert "merging by ties" in errors
    table = json.loads((family / "out/evaluation.json").read_text())
    assert list(table["rows"]) == ["experts", "base", "average", "ties"]
    assert (family / "out/evaluation.png").read_bytes().startswith(b"\x89PNG")
    lines = (family / "out/evaluation.md").read_text().splitlines()
    assert len(lines[0].split("|")) == 7
    (direct,) = evaluate({"x": str(family / "out/merged/ties")}, Run(load_tasks(tasks), CPU)).rows
    assert [s.score for s in direct.known()] == [table["rows"]["ties"]["tasks"][t]["score"] for t in ("topic", "tone")]
    failed(run(capsys, *words, "-o", family / "out"), 2, "holds an evaluation")
    code, _, errors = run(capsys, *words, "-o", family / "out", "--overwrite", "--quiet")
    assert (code, errors) == (0, "")


def test_rules_side_by_side_plan_once_and_give_the_bytes_of_each_alone(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []

    def counted(recipe: Recipe, *models: Any) -> Any:
        planned.append(recipe.method.name)
        return make_plan(recipe, *models)

    monkeypatch.setattr(opening, "make_plan", counted)
    base, experts = str(family / "base"), [str(family / "topic"), str(family / "tone")]
    recipes = by_methods(make_recipe({"base": base, "experts": experts}, "test"), ["ties", "ace"])
    merge_all(recipes, family / "out", RunOptions(), lambda _: None)
    assert planned == ["ties", "ace"]
    for name in recipes:
        acemerge.merge(base, experts, name, family / name)
        alone, beside = (folder / "model.safetensors" for folder in (family / name, family / "out/merged" / name))
        assert alone.read_bytes() == beside.read_bytes()


def test_experts_of_the_recipe_lend_their_heads(family: Path) -> None:
    lora = write_adapter(family / "tone-lora", {"query": (torch.ones(1, 4), torch.ones(4, 1))})
    tasks = load_tasks(write_tasks(family, _task("topic"), _task("tone", head="tone-lora"), _task("other")))
    experts = [str(family / "topic"), str(lora)]
    recipe = make_recipe({"base": str(family / "base"), "experts": experts}, "test")
    assert [task.expert for task in with_experts(tasks, recipe).tasks] == [*experts, None]


@pytest.fixture
def adapter(family: Path) -> tuple[Path, Any]:
    """An adapter of one layer and of the head in three classes, and the network that both make of the base."""
    name, generator = "roberta.encoder.layer.1.intermediate.dense", torch.Generator().manual_seed(5)
    A, B = torch.randn(2, 16, generator=generator), torch.randn(24, 2, generator=generator)
    head = {k: v for k, v in load_file(family / "topic/model.safetensors").items() if k.startswith("classifier.")}
    state = load_file(family / "base/model.safetensors") | head
    network = make_model("roberta", num_labels=3, **ROOM)
    network.load_state_dict(state | {f"{name}.weight": state[f"{name}.weight"] + B @ A})
    head = {k: v for k, v in undecided(network).state_dict().items() if k.startswith("classifier.")}
    folder = write_adapter(family / "lora", {name: (A, B)}, modules_to_save=["classifier"])
    tensors = load_file(folder / "adapter_model.safetensors") | {f"base_model.model.{k}": v for k, v in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, lambda **row: network(**row).logits


def test_an_adapter_by_itself_is_scored_in_its_base(
    family: Path, adapter: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, network = adapter
    labels = [i % 3 for i in range(41)]
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": labels})
    predictions = logits_one_by_one(family / "base", network, TEXTS).argmax(1).numpy()
    assert len(set(predictions)) > 1
    tasks = write_tasks(family, _task("topic", expert="lora"), resamples=100)
    words = ["evaluate", folder, "--base", family / "base", "--tasks", tasks, "-o", family / "out", "--quiet"]
    assert run(capsys, *words) == (0, "", "")
    rows = json.loads((family / "out/evaluation.json").read_text())["rows"]
    for row in ("lora", "experts"):
        assert rows[row]["tasks"]["topic"]["score"] == np.mean(predictions == labels)
        assert "heads/lora.safetensors" in rows[row]["tasks"]["topic"]["head"]
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    words = ["compare", folder, "--base", family / "base", "--tasks", tasks, "-o", family / "compared", "--quiet"]
    assert run(capsys, *words) == (0, "", "")
    compared = json.loads((family / "compared/evaluation.json").read_text())["rows"]
    assert compared["lora"]["tasks"]["topic"]["score"] == np.mean(predictions == labels)
    lent = evaluate({"base": str(family / "base")}, Run(load_tasks(tasks), CPU, base=str(family / "base"))).rows[-1]
    assert "heads/lora.safetensors" in lent.known()[0].about["head"]


def test_without_matplotlib_the_numbers_are_kept(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(41)]})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["evaluate", family / "topic", "--tasks", write_tasks(family, _task("topic")), "-o", family / "scores"]
    code, printed, errors = run(capsys, *words)
    assert code == 0, errors
    assert "no evaluation.png: matplotlib is not installed; pip install 'acemerge[eval]'" in printed
    assert sorted(file.name for file in (family / "scores").iterdir()) == ["evaluation.json", "evaluation.md"]


def test_wrong_commands(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tsv(family / "topic.tsv", {"s": TEXTS, "y": [0] * 41})
    tasks = write_tasks(family, _task("topic"))
    model, out = family / "topic", ["-o", family / "out"]
    failed(run(capsys, "evaluate", model), 2, "--tasks")
    failed(run(capsys, "evaluate", model, "--tasks", tasks, "-o", model / "in"), 2, "inside or around the input")
    failed(run(capsys, "compare", model, "--tasks", tasks), 2, "-o is missing")
    failed(run(capsys, "compare", "--tasks", tasks, *out), 2, "nothing to compare")
    failed(run(capsys, "compare", "--tasks", tasks, "--methods", "ace", *out), 2, "nothing to merge")
    words = ["compare", "--tasks", tasks, "--base", family / "base", "--expert", model]
    failed(run(capsys, *words, *out), 2, "--methods is missing")
    failed(run(capsys, *words, "--methods", "acee", *out), 2, "did you mean `ace`")
    failed(run(capsys, *words, "--methods", "ties", "else/ties", *out), 2, "has the name of the rule ties")
    failed(run(capsys, *words, "--methods", "ties", "else/base", *out), 2, "has the name of the recipe's base")
    assert not (family / "out").exists()
    words = ["compare", "--tasks", tasks, "--base", family / "base", "--methods", "ace", *out]
    failed(run(capsys, *words), 2, "--expert is missing; give --expert or a recipe file")
    (family / "recipe.yaml").write_text(f"experts: [{model}]")
    failed(run(capsys, *words, family / "recipe.yaml", family / "ace"), 2, "rename its folder, or leave it out")
