"""Merges by what was measured on data, end to end."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from builders import load_folder, make_model
from calibrated_family import EXPERTS, examples, merge, moments_of, second_moment, task_vectors
from oracles import relative_error
from safetensors.torch import load_file, save_file
from task_builders import ROOM, save_model, sentences, sharpened, write_tasks
from torch import Tensor

import acemerge
from acemerge.calibration import gradients
from acemerge.calibration.blocks import block_of
from acemerge.calibration.both_sides import both_second_moments
from acemerge.methods.kfac import both_moments
from acemerge.methods.status import Status
from acemerge.output.manifest import load_manifest
from acemerge.tasks.networks import open_model
from acemerge.tasks.task_file import load_tasks


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


def test_kfac_merges_by_inputs_and_by_gradients_at_the_outputs(family: Path) -> None:
    """By hand: each example's loss of an answer drawn by the expert, and what comes back to a layer's output."""
    report, merged = merge(family, "kfac", tol=1e-10), load_folder(family / "out")
    names = [name for name, record in report.tensors.items() if record["rule"] == "kfac"]
    assert len(names) == 13
    chosen = [
        "roberta.encoder.layer.0.attention.self.value.weight",
        "roberta.encoder.layer.1.intermediate.dense.weight",
    ]
    moments = [
        factors_by_hand(family, family / name, i, task, chosen)
        for i, (name, task) in enumerate((("topic", "topic"), ("tone", "mood")))
    ]
    for name in chosen:
        base, deltas = task_vectors(family, name)
        expected = oracles.kfac(deltas, torch.stack([of_expert[name] for of_expert in moments]))
        assert relative_error(merged[name] - base, expected) < 1e-3, name
    assert report.manifest["calibration"]["topic"]["tasks"]["topic"]["labels"] == "not read"


def factors_by_hand(root: Path, folder: Path, number: int, task: str, names: list[str]) -> dict[str, Tensor]:
    """The moments of the inputs, and behind them of the gradients, of these layers."""
    from transformers import RobertaForSequenceClassification

    network = RobertaForSequenceClassification.from_pretrained(folder).eval()
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for name, rows in kept.items():
        module = network.get_submodule(name.removesuffix(".weight"))

        def keep(
            _: object, given: tuple[Tensor, ...], output: Tensor, rows: list[tuple[Tensor, Tensor]] = rows
        ) -> None:
            output.retain_grad()
            rows.append((given[0], output))

        module.register_forward_hook(keep)
    for i, example in enumerate(examples(root, number)):
        logs = network(**example).logits[0].log_softmax(0)
        chance = torch.Generator().manual_seed(zlib.crc32(f"{task}/{i}".encode()))
        logs[int(torch.multinomial(logs.detach().exp(), 1, generator=chance))].backward()
    return {
        name: torch.cat(
            [second_moment([z.detach() for z, _ in rows]).flatten(), second_moment([y.grad for _, y in rows]).flatten()]
        )
        for name, rows in kept.items()
    }


def test_kfac_of_a_language_model_draws_every_token(tmp_path: Path) -> None:
    """A Conv1D layer, whose weight is stored with its inputs as rows."""
    save_model(tmp_path / "gpt2", sharpened(make_model("gpt2"), 1))
    (tmp_path / "text.txt").write_text(" ".join(sentences(12, seed=3)))
    write_tasks(tmp_path, {"kind": "perplexity", "name": "lm", "data": "text.txt", "context": 8, "stride": 8})
    task, model = load_tasks(tmp_path / "tasks.yaml").tasks, open_model(str(tmp_path / "gpt2"), torch.device("cpu"))
    name = "transformer.h.1.mlp.c_fc.weight"
    found = dict(both_second_moments(model, task, {name: model.checkpoint.tensors[name]}))[name]
    S, A = both_moments(found, 64, 16)
    assert relative_error(S, moments_of(tmp_path, tmp_path / "gpt2", 0)[name]) < 1e-5
    assert relative_error(A, A.T) < 1e-12
    assert torch.linalg.eigvalsh(A)[-1] > 0


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
