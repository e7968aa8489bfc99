"""Calibration end to end: what hooks see against what is computed by hand, and merges that use it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from builders import load_folder, make_model, write_adapter
from commands import failed, run
from oracles import relative_error
from safetensors.torch import load_file, save_file
from task_builders import ROOM, save_family, save_model, sentences, sharpened, write_tasks, write_tsv
from torch import Tensor, nn

import acemerge
from acemerge.calibration import calibrate, gradients
from acemerge.calibration.blocks import block_of
from acemerge.calibration.hooks import watching
from acemerge.engine.opening import RunOptions, open_recipe
from acemerge.errors import CheckpointError, UsageError
from acemerge.methods.status import Status
from acemerge.output.manifest import load_manifest
from acemerge.recipes.recipe import load_recipe
from acemerge.tasks.networks import open_model
from acemerge.tasks.task_file import load_tasks

TEXTS = sentences(9, seed=1)
EXPERTS = {"topic": 3, "tone": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa classifiers, and tasks.yaml with some texts for each; tone has no labels."""
    root = save_family(tmp_path_factory.mktemp("family"), EXPERTS)
    write_tsv(root / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(len(TEXTS))]})
    write_tsv(root / "tone.tsv", {"s": sentences(6, seed=2)})
    topic = {"kind": "classification", "name": "topic", "data": "topic.tsv", "text": "s", "label": "y", "batch_size": 4}
    tone = {"kind": "classification", "name": "mood", "data": "tone.tsv", "text": "s", "expert": "tone"}
    write_tasks(root, topic, tone)
    return root


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    return shutil.copytree(made, tmp_path / "family")


def merge(root: Path, method: str, out: str = "out", **options: Any) -> acemerge.MergeReport:
    experts = [root / name for name in EXPERTS]
    given = {"calibration": str(root / "tasks.yaml"), **options}
    return acemerge.merge(root / "base", experts, method, root / out, **given)


def moments_of(root: Path, model: Path, number: int) -> dict[str, Tensor]:
    task = load_tasks(root / "tasks.yaml", labelled=False).tasks[number]
    return dict(acemerge.input_second_moments(model, task))


def examples(root: Path, number: int) -> list[dict[str, Tensor]]:
    """Every text by itself, as the model takes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    return [tokenizer(text, return_tensors="pt") for text in (TEXTS, sentences(6, seed=2))[number]]


def task_vectors(root: Path, name: str) -> tuple[Tensor, Tensor]:
    base, *experts = (load_folder(root / folder)[name].double() for folder in ("base", *EXPERTS))
    return base, torch.stack(experts) - base


def second_moment(rows: list[Tensor]) -> Tensor:
    Z = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double()
    return Z.T @ Z / len(Z)


# --- what is seen ----------------------------------------------------------------------------------------------


def test_second_moments_are_those_of_every_token_computed_by_hand(family: Path) -> None:
    """Each text alone: no batch, no padding."""
    from transformers import RobertaForSequenceClassification

    found = moments_of(family, family / "topic", 0)
    network = RobertaForSequenceClassification.from_pretrained(family / "topic")
    layer = network.roberta.encoder.layer[1]
    inputs, attended, inner, heads = [], [], [], []
    with torch.no_grad():
        for example in examples(family, 0):
            states = network.roberta(**example, output_hidden_states=True).hidden_states
            inputs.append(states[1])
            attended.append(layer.attention(states[1])[0])
            inner.append(layer.intermediate(attended[-1]))
            heads.append(states[2][:, 0])
    prefix = "roberta.encoder.layer.1"
    for name, rows in (
        (f"{prefix}.attention.self.query.weight", inputs),
        (f"{prefix}.attention.self.value.weight", inputs),
        (f"{prefix}.intermediate.dense.weight", attended),
        (f"{prefix}.output.dense.weight", inner),
        ("classifier.dense.weight", heads),
    ):
        assert relative_error(found[name], second_moment(rows)) < 1e-5, name
    assert found[f"{prefix}.output.dense.weight"].dtype == torch.float64
    assert not any("embeddings" in name for name in found)


def test_a_conv1d_is_seen_with_its_inputs(tmp_path: Path) -> None:
    save_model(tmp_path / "gpt2", sharpened(make_model("gpt2"), 1))
    (tmp_path / "text.txt").write_text(" ".join(sentences(12, seed=3)))
    write_tasks(tmp_path, {"kind": "perplexity", "name": "lm", "data": "text.txt", "context": 8, "stride": 8})
    found = moments_of(tmp_path, tmp_path / "gpt2", 0)
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokens = AutoTokenizer.from_pretrained(tmp_path / "gpt2")((tmp_path / "text.txt").read_text())["input_ids"]
    network = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").transformer
    rows = []
    with torch.no_grad():
        for window in torch.tensor(tokens).split(8):
            states = network(input_ids=window[None], output_hidden_states=True).hidden_states
            rows.append(network.h[1].ln_1(states[1]))
    assert relative_error(found["transformer.h.1.attn.c_attn.weight"], second_moment(rows)) < 1e-5
    assert found["transformer.h.1.mlp.c_proj.weight"].shape == (64, 64)  # stored (64, 16): its inputs are the rows


@pytest.mark.parametrize("family_name", ["qwen3_moe", "gpt_oss"])  # apart on disk, and one stack
def test_fused_experts_are_seen_with_the_tokens_sent_to_each(family_name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", sharpened(make_model(family_name), 1))
    (tmp_path / "text.txt").write_text(" ".join(sentences(12, seed=3)))
    write_tasks(tmp_path, {"kind": "perplexity", "name": "lm", "data": "text.txt", "context": 8, "stride": 8})
    found = moments_of(tmp_path, model, 0)
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    fused = next(m for _, m in network.named_modules() if type(m).__name__.endswith("Experts"))
    sent: list[list[Tensor]] = [[] for _ in range(fused.num_experts)]

    def route(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tokens, *routing = (*args, *kwargs.values())
        for i, rows in enumerate(sent):
            rows.append(tokens[(routing[0] == i).any(-1)])

    fused.register_forward_pre_hook(route, with_kwargs=True)
    ids = transformers.AutoTokenizer.from_pretrained(model)((tmp_path / "text.txt").read_text())["input_ids"]
    with torch.no_grad():
        for window in torch.tensor(ids).split(8):
            network(input_ids=window[None])
    expected = [second_moment(rows) if sum(map(len, rows)) else torch.zeros(16, 16) for rows in sent]
    names = [name for name in found if "layers.0." in name and "gate" in name and "experts" in name]
    seen = [found[name] for name in sorted(names)]
    if len(seen) == 1:  # one stack on disk, too
        (seen,) = seen
    assert len(seen) == fused.num_experts
    for own, computed in zip(seen, expected, strict=True):
        assert relative_error(own, computed) < 1e-5


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class _Odd(nn.Module):
    """A linear layer, weights that are used but not as one, and stacked weights in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.added, self.stacked = nn.Linear(3, 3), nn.Linear(3, 3), _Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.stacked((self.plain(x) + x @ self.added.weight).view(2, 1, 3))


def test_a_weight_that_is_used_in_another_way_is_not_seen() -> None:
    network, seen = _Odd(), []
    parameters = {f"{name}.weight" for name in ("plain", "added", "stacked")}
    with watching(network, parameters, lambda layer, x: seen.append((layer, tuple(x.shape)))):
        network(torch.ones(2, 3))
    network(torch.ones(2, 3))
    assert seen == [(("plain.weight", 0), (2, 3)), (("stacked.weight", 0), (1, 3)), (("stacked.weight", 1), (1, 3))]


# --- merges ------------------------------------------------------------------------------------------------------


def test_regmean_merges_by_each_experts_own_inputs(family: Path) -> None:
    report, merged = merge(family, "regmean"), load_folder(family / "out")
    moments = [moments_of(family, family / name, i) for i, name in enumerate(EXPERTS)]
    for name, record in report.tensors.items():
        base, deltas = task_vectors(family, name) if record["rule"] != "base" else (None, None)
        if record["rule"] == "regmean":
            expected = oracles.regmean(deltas, torch.stack([of_expert[name] for of_expert in moments]))
            assert relative_error(merged[name] - base, expected) < 1e-3, name
            assert record["status"] in ("ok", "float64")
        elif record["rule"] == "average":
            assert relative_error(merged[name], base + deltas.mean(0)) < 1e-6
    assert sum(record["rule"] == "regmean" for record in report.tensors.values()) == 13
    about = load_manifest(family / "out")["calibration"]
    assert about["topic"]["not seen"] == []
    assert about["topic"]["tasks"]["topic"]["examples"] == 9
    assert about["topic"]["tasks"]["topic"]["labels"] == "not read"
    assert len(about["tone"]["tasks"]["mood"]["sha256"]) == 64
    assert not (family / "out/.acemerge.work").exists()
    assert (
        "Made with acemerge, with examples of `topic`, `mood`, from the base" in (family / "out/README.md").read_text()
    )


def test_several_tasks_of_one_expert_are_one_data_set(family: Path) -> None:
    tasks = load_tasks(family / "tasks.yaml", labelled=False).tasks
    both = dict(acemerge.input_second_moments(family / "topic", [t.model_copy(update={"label": None}) for t in tasks]))
    name = "roberta.encoder.layer.0.attention.self.key.weight"
    counts = [sum(example["input_ids"].numel() for example in examples(family, i)) for i in (0, 1)]
    parts = [moments_of(family, family / "topic", i)[name] for i in (0, 1)]
    expected = (counts[0] * parts[0] + counts[1] * parts[1]) / sum(counts)
    assert relative_error(both[name], expected) < 1e-6


def test_sums_that_do_not_fit_together_are_made_one_after_the_other(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = moments_of(family, family / "topic", 0)
    monkeypatch.setattr("acemerge.calibration.moments._LIMIT", 10_000)
    in_turn = moments_of(family, family / "topic", 0)
    assert in_turn.keys() == at_once.keys()
    assert all(torch.equal(in_turn[name], moment) for name, moment in at_once.items())


def squared_gradients(root: Path, folder: Path, number: int, answer: Callable[[int, Tensor], int]) -> dict[str, Tensor]:
    """One example after the other, by autograd in float64."""
    from transformers import RobertaForSequenceClassification

    network = RobertaForSequenceClassification.from_pretrained(folder).double().eval()
    total: dict[str, Tensor] = {}
    rows = examples(root, number)
    for i, example in enumerate(rows):
        network.zero_grad()
        logs = network(**example).logits[0].log_softmax(0)
        logs[answer(i, logs)].backward()
        for name, p in network.named_parameters():
            total[name] = total.get(name, 0) + p.grad.square() / len(rows)
    return total


def test_fisher_weighs_by_squared_gradients_of_single_examples(family: Path) -> None:
    """topic has labels; those of tone are drawn from its own answers, by the task's name and the example's number."""
    rules = [{"match": "*LayerNorm*", "method": "fisher"}]
    report, merged = merge(family, "fisher", rules=rules), load_folder(family / "out")

    def drawn(i: int, logs: Tensor) -> int:
        import zlib

        chance = torch.Generator().manual_seed(zlib.crc32(f"mood/{i}".encode()))
        return int(torch.multinomial(logs.detach().float().exp(), 1, generator=chance))

    given = squared_gradients(family, family / "topic", 0, lambda i, _: i % 3)
    own = squared_gradients(family, family / "tone", 1, drawn)
    for name, record in report.tensors.items():
        if record["rule"] == "fisher":
            base, deltas = task_vectors(family, name)
            expected = oracles.fisher(deltas, torch.stack([given[name], own[name]]))
            assert relative_error(merged[name] - base, expected) < 1e-3, name
    assert sum(record["rule"] == "fisher" for record in report.tensors.values()) == 13 + 10
    about = report.manifest["calibration"]
    assert about["topic"]["tasks"]["topic"]["labels"] == "given"
    assert about["tone"]["tasks"]["mood"]["labels"] == "drawn from the expert's own answers"


def test_images_against_sentences_move_the_half_that_sees(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder = save_model(tmp_path / "clip", sharpened(make_model("clip"), 2))
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    classes = ["cat", "dog"]
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, values in zip(classes, pixels, strict=True):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(values.numpy()).save(tmp_path / "pets" / name / "0.png")
    write_tasks(tmp_path, {"kind": "zero_shot", "name": "pets", "data": "pets", "templates": ["the {}"]})
    tasks = load_tasks(tmp_path / "tasks.yaml").tasks
    model = open_model(str(folder), torch.device("cpu"))
    found = dict(gradients.squared_gradients(model, tasks, model.checkpoint.tensors))
    network = CLIPModel.from_pretrained(folder)
    processor, words = CLIPImageProcessor.from_pretrained(folder), [f"the {name}" for name in classes]
    tokens = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt")
    expected: dict[str, Tensor] = {}
    for i, values in enumerate(pixels):
        network.zero_grad()
        seen = processor(images=[Image.fromarray(values.numpy())], return_tensors="pt")["pixel_values"]
        network(**tokens, pixel_values=seen).logits_per_image[0].log_softmax(0)[i].backward()
        for name, p in network.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.double().square() / 2
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert relative_error(found[name], expected[name]) < 1e-4
    assert not any(name.startswith("text_model") for name in found)
    moments = dict(acemerge.input_second_moments(folder, tasks[0]))
    assert moments[name].shape == (16, 16)
    assert not any(name.startswith("text_model") for name in moments)


def test_regmean_pp_takes_inputs_through_the_blocks_that_are_merged(family: Path) -> None:
    """By hand: for every block, a checkpoint of the expert with all that comes before it merged."""
    report, merged = merge(family, "regmean_pp"), load_folder(family / "out")
    blocks = ["roberta.encoder.layer.0", "roberta.encoder.layer.1", "classifier.dense"]
    calibrated = [name for name, record in report.tensors.items() if record["rule"] == "regmean_pp"]
    assert {block_of(name) for name in calibrated} == set(blocks)
    for n, block in enumerate(blocks):
        moments = []
        for i, expert in enumerate(EXPERTS):
            state = load_file(family / expert / "model.safetensors")
            before = {name: v for name, v in merged.items() if block_of(name) not in blocks[n:] and name in state}
            same = {name: v for name, v in before.items() if v.shape == state[name].shape}
            mixed = family / f"mixed-{n}-{i}"
            save_model(mixed, make_model("roberta", num_labels=EXPERTS[expert], **ROOM))
            save_file(state | same, mixed / "model.safetensors", metadata={"format": "pt"})
            moments.append(moments_of(family, mixed, i))
        for name in (name for name in calibrated if block_of(name) == block):
            base, deltas = task_vectors(family, name)
            expected = oracles.regmean(deltas, torch.stack([of_expert[name] for of_expert in moments]))
            assert relative_error(merged[name] - base, expected) < 1e-3, name
    merge(family, "regmean", "plain")
    theirs = load_folder(family / "plain")
    assert relative_error(theirs[calibrated[-1]], merged[calibrated[-1]]) > 0.1


def test_what_is_not_seen_is_averaged_and_named(family: Path) -> None:
    report, merged = merge(family, "regmean", embeddings="rule"), load_folder(family / "out")
    name = "roberta.embeddings.word_embeddings.weight"
    base, deltas = task_vectors(family, name)
    assert report.records[name].stats.statuses == (Status.UNSEEN,)
    assert relative_error(merged[name], base + deltas.mean(0)) < 1e-6
    assert name in report.manifest["calibration"]["tone"]["not seen"]


# --- again, and what is refused ------------------------------------------------------------------------------------


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
    failed(run(capsys, *ask), 2, "method regmean: needs calibration data; name tasks .* by --calibration TASKS.yaml")
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
    with pytest.raises(UsageError, match=r"expert lora: is an adapter .*; merge it with its base alone first"):
        acemerge.merge(family / "base", [adapter], "regmean", calibration=str(family / "tasks.yaml"))
    write_tasks(
        family, {"kind": "images", "name": "topic", "data": "."}, {"kind": "images", "name": "tone", "data": "."}
    )
    with pytest.raises((UsageError, CheckpointError)):
        merge(family, "regmean")
    assert not (family / "out").exists()
