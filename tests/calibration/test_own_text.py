"""`--calibration self`: causal language models that write the text they are calibrated on."""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from builders import load_folder, make_model, perturb, write_checkpoint
from calibrated_family import second_moment
from commands import failed, run
from oracles import relative_error
from task_builders import save_model, sharpened, write_tasks
from torch import Tensor

import acemerge
from acemerge.calibration import calibrate
from acemerge.errors import ResourceError
from acemerge.tasks import own_text
from acemerge.tasks.networks import open_model

TEXTS, TOKENS = 8, 12
EXPERTS = ("math", "code")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    save_related(root, "llama")
    return root


def save_related(root: Path, family: str, **changes: Any) -> None:
    """A base that has something to say, and experts near it."""
    save_model(root / "base", sharpened(make_model(family, **changes), 7))
    for seed, name in enumerate(EXPERTS):
        save_model(root / name, perturb(sharpened(make_model(family, **changes), 7), seed, 0.05))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "TEXTS", TEXTS)
    monkeypatch.setattr(own_text, "TOKENS", TOKENS)


def merge(root: Path, method: str, out: Path, **options: Any) -> acemerge.MergeReport:
    return acemerge.merge(root / "base", [root / name for name in EXPERTS], method, out, calibration="self", **options)


def written_by_hand(folder: Path, label: str, seed: int = 0) -> list[Tensor]:
    """Every text by itself, read from its beginning for each token."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    first, last = network.config.bos_token_id, network.config.eos_token_id
    own = zlib.crc32(f"{seed}/{label}".encode())
    texts = []
    for i in range(TEXTS):
        chance, text = torch.Generator().manual_seed(zlib.crc32(f"{own}/{i}".encode())), [first]
        while len(text) < TOKENS and (len(text) == 1 or text[-1] != last):
            with torch.no_grad():
                likely = network(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1)
            text.append(int(torch.multinomial(likely, 1, generator=chance)))
        texts.append(torch.tensor(text))
    return texts


def test_texts_are_drawn_token_by_token_and_differ_by_seed_and_expert(made: Path) -> None:
    model = open_model(str(made / "math"), torch.device("cpu"))
    expected = written_by_hand(made / "math", "math")
    asked = own_text.own_text(0, "math")
    windows = own_text.OwnText(asked.seed, own_text.write_text(model, asked)).windows
    assert [window.tolist() for window in windows] == [text.tolist() for text in expected]
    assert {len(text) for text in expected} > {TOKENS}  # some end before
    for other in (own_text.own_text(1, "math"), own_text.own_text(0, "code")):
        assert not torch.equal(own_text.write_text(model, other), own_text.write_text(model, asked))


def test_regmean_merges_by_the_inputs_of_what_each_expert_writes(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = merge(made, "regmean", tmp_path / "out")
    merged, base = load_folder(tmp_path / "out"), load_folder(made / "base")
    name, moments, deltas = "model.layers.1.self_attn.v_proj.weight", [], []
    for label in EXPERTS:
        network, rows = AutoModelForCausalLM.from_pretrained(made / label), []
        network.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, given, rows=rows: rows.append(given[0].detach())
        )
        for text in written_by_hand(made / label, label):
            network(input_ids=text[None])
        moments.append(second_moment(rows))
        deltas.append(load_folder(made / label)[name].double() - base[name].double())
    expected = oracles.regmean(torch.stack(deltas), torch.stack(moments))
    assert relative_error(merged[name].double() - base[name].double(), expected) < 1e-3
    about = report.manifest["calibration"]["math"]
    assert about["not seen"] == []
    assert about["tasks"]["own text"] == {
        "kind": "own text",
        "data": "written by the expert",
        "labels": "not read",
        "texts": TEXTS,
        "tokens": TOKENS,
        "seed": zlib.crc32(b"0/math"),
    }
    assert "with examples of `own text`" in (tmp_path / "out/README.md").read_text()


def test_kfac_takes_it_too_and_a_seed_changes_it(made: Path, tmp_path: Path) -> None:
    first, again, other = (
        merge(made, "kfac", tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert {record["rule"] for record in first.tensors.values()} == {"kfac", "average"}
    outputs = [[(file["sha256"]) for file in found.manifest["outputs"].values()] for found in (first, again, other)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_run_that_was_stopped_goes_on_with_what_was_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    written: list[str] = []
    write = own_text.write_text
    monkeypatch.setattr(calibrate, "write_text", lambda model, *rest: written.append(model.name) or write(model, *rest))
    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "second_moments", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(made, "regmean", tmp_path / "out")
    merge(made, "regmean", tmp_path / "out", resume=True)
    assert len(written) == len(EXPERTS)
    whole = merge(made, "regmean", tmp_path / "whole")
    resumed = load_folder(tmp_path / "out")
    assert all(torch.equal(value, resumed[name]) for name, value in load_folder(tmp_path / "whole").items()), whole


def words(root: Path, *more: object) -> list[object]:
    return ["--base", root / "base", *(word for name in EXPERTS for word in ("--expert", root / name)), *more]


def test_the_plan_counts_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", *words(made, "--method", "kfac", "--calibration", "self", "--json"))
    assert code == 0
    import json

    counted = json.loads(out)["operations"]
    code, out, _ = run(capsys, "plan", *words(made, "--method", "kfac", "--calibration", "self"))
    assert "expert code: to be calibrated on own text" in out
    shapes = {name: value.shape for name, value in load_folder(made / "base").items() if value.ndim == 2}
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert counted > 2 * own_text_tokens() * 2 * 4 * weights  # two experts; written, run again, and back


def own_text_tokens() -> int:
    """In the plan, which has its own constants."""
    from acemerge.planning import costs

    return costs.TEXTS * costs.TOKENS


def test_other_architectures_say_in_a_line_that_they_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_related(tmp_path, "roberta", num_labels=2)
    capsys.readouterr()
    found = run(
        capsys, "merge", *words(tmp_path, "--method", "regmean", "--calibration", "self", "-o", tmp_path / "out")
    )
    what = "self: RobertaForSequenceClassification cannot write the text that it is calibrated on; only causal"
    failed(found, 2, what)
    assert not (tmp_path / "out").exists()


def test_a_recipe_says_it_as_a_word_not_a_file(made: Path, tmp_path: Path) -> None:
    from acemerge.recipes.recipe import load_recipe

    content = f"{{method: regmean, base: {made}/base, experts: [{made}/math], calibration: self}}"
    (tmp_path / "recipe.yaml").write_text(content)
    assert load_recipe(tmp_path / "recipe.yaml", {}).calibration == "self"


@pytest.mark.parametrize("method", ["regmean", "fisher", "kfac"])
@pytest.mark.parametrize("calibration", ["self", "tasks.yaml"])
def test_weights_that_are_not_finite_are_found_as_the_error_says(
    method: str, calibration: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(made / "math", tmp_path / "math")
    weights = load_folder(broken)
    weights["model.norm.weight"][1] = torch.nan
    write_checkpoint(broken, weights)
    (tmp_path / "text.txt").write_text("the cat sees a dog and the old bird eats here now")
    task = {"name": "t", "kind": "perplexity", "data": "text.txt", "expert": str(broken), "context": 8, "stride": 8}
    write_tasks(tmp_path, task)
    words = ("--base", made / "base", "--expert", broken, "--method", method, "-o", tmp_path / "out", "--quiet")
    given = calibration if calibration == "self" else tmp_path / calibration
    _, _, said = run(capsys, "merge", *words, "--calibration", given)
    command = re.search(r"; acemerge (.*) tells whether its weights are\n", said)
    assert command, said
    assert "is nan at [1]" in run(capsys, *command[1].replace("MODEL", str(broken)).split())[2]


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("can't allocate memory")],
)
@pytest.mark.parametrize("calibration", ["self", "tasks.yaml"])
def test_a_batch_that_does_not_fit_can_be_made_smaller(
    failure: Exception, calibration: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at once are too much."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def of_one_row(network: Any, *args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 1:
            raise failure
        return forward(network, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", of_one_row)
    (tmp_path / "text.txt").write_text("the cat sees a dog and the old bird eats here now")
    task = {"name": "t", "kind": "perplexity", "data": "text.txt", "expert": str(made / "math")}
    write_tasks(tmp_path, task | {"context": 4, "stride": 4, "batch_size": 2})
    given = calibration if calibration == "self" else tmp_path / calibration
    with pytest.raises(ResourceError, match=r"; give tasks with a smaller batch_size, .* by --calibration TASKS.yaml$"):
        acemerge.merge(made / "base", [made / "math"], "regmean", calibration=given)
    write_tasks(tmp_path, task | {"context": 4, "stride": 4, "batch_size": 1})
    acemerge.merge(made / "base", [made / "math"], "regmean", calibration=tmp_path / "tasks.yaml")
