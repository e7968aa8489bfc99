"""Models whose layers are slices of others': whose values they have, and that all else holds for them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from builders import load_folder, write_adapter, write_checkpoint
from hashes import stored_hashes, tensors_read
from mergekit_shelf import layers_of, make_shelf, merged, read, stack
from torch import Tensor

import acemerge
from acemerge import api
from acemerge.checkpoints import files
from acemerge.cli.app import main
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.models.depth import stacked_config
from acemerge.output.verify import verify
from acemerge.recipes.recipe import load_recipe

base, a, b, c = (layers_of(f"f32/{name}") for name in ("base", "a", "b", "c"))
TWO_MODELS = stack("passthrough", [a(0, 3)], [b(1, 4)], [a(2, 3)])
WHOSE = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 2)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


def of_layer(models: dict[str, dict[str, Tensor]], name: str, whose: list[tuple[str, int]]) -> Tensor:
    """The tensor that a tensor of the output is: of layers as given, else of the first or the last layer's model."""
    if "layers." not in name:
        return models[whose[0 if "embed" in name else -1][0]][name]
    number = int(name.split(".")[2])
    key, layer = whose[number]
    return models[key][name.replace(f"layers.{number}.", f"layers.{layer}.")]


def test_layers_of_two_models_are_stacked_as_they_are(shelf: Path) -> None:
    found, models = merged(shelf, TWO_MODELS, "stacked"), read(shelf)
    assert len(found) == 7 * 9 + 3
    for name, value in found.items():
        assert torch.equal(value, of_layer(models, name, WHOSE)), name
    model = transformers.AutoModelForCausalLM.from_pretrained(shelf / "stacked")
    assert len(model.model.layers) == 7
    assert torch.equal(model.model.layers[6].mlp.up_proj.weight, models["a"]["model.layers.2.mlp.up_proj.weight"])


def test_the_manifest_names_each_model_with_its_own_file(shelf: Path) -> None:
    merged(shelf, TWO_MODELS, "verified")
    manifest = verify(shelf / "verified")
    assert [part["base"] for part in manifest["recipe"]["slices"]] == [[0, 3], [1, 4], [2, 3]]
    assert {given["path"] for given in manifest["inputs"]} == {str(shelf / "f32" / key) for key in "ab"}
    for given in manifest["inputs"]:
        ((name, about),) = given["files"].items()
        assert about["tensors"].items() <= stored_hashes(Path(given["path"], name)).items()
    layers = ({int(name.split(".")[2]) for name in read if ".layers." in name} for read in tensors_read(manifest))
    assert list(layers) == [{0, 1, 2}, {0, 1, 2}, {1, 2, 3}]


def test_an_interrupted_stack_is_gone_on_with(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged(shelf, TWO_MODELS, "whole")
    recipe, out, done = load_recipe(shelf / "whole.yml", {}), shelf / "resumed", []
    real = acemerge.engine.writing.TensorFiles.end_of_tensor

    def end_of_tensor(self: Any, names: list[str]) -> Any:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(names)
        return real(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
        patch.setattr(acemerge.engine.writing.TensorFiles, "end_of_tensor", end_of_tensor)
        with pytest.raises(KeyboardInterrupt):
            api.run_recipe(recipe, out, RunOptions())
    other = stack("passthrough", [a(0, 3)], [b(0, 3)], [a(2, 3)])
    (shelf / "other.yml").write_text(yaml.safe_dump(other))
    with pytest.raises(UsageError, match="cannot go on: recipe slices"):
        api.run_recipe(load_recipe(shelf / "other.yml", {}), out, RunOptions(resume=True))
    api.run_recipe(recipe, out, RunOptions(resume=True))
    assert all(torch.equal(value, expected[name]) for name, value in load_folder(out).items())
    assert files.sha256(out / "model.safetensors") == files.sha256(shelf / "whole" / "model.safetensors")


def test_experts_that_are_no_part_of_a_slice_do_not_count_there(shelf: Path) -> None:
    """Against the rule on the models of each slice alone: three of them, two, and the base by itself."""
    parts = [["base", "a", "b", "c"], ["base", "c", "a"], ["base"]]
    slices = [[layers_of(f"f32/{key}")(i, i + 1) for key in keys] for i, keys in enumerate(parts)]
    found, models = merged(shelf, stack("sce", *slices, base="f32/base", select_topk=0.5), "sce"), read(shelf)
    for name, value in found.items():
        number = int(name.split(".")[2]) if "layers." in name else 0 if "embed" in name else 2
        W0, *others = (models[key][name] for key in parts[number])
        expected = W0
        if others:
            D = torch.stack([W - W0 for W in others])
            expected = W0 + acemerge.merge_deltas(D, "mergekit_sce", select=0.5).delta
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)


def test_the_configuration_follows_the_layers() -> None:
    one = {"num_hidden_layers": 3, "layer_types": ["a0", "a1", "a2"], "mlp_only_layers": [0, 2], "layer_norm": [1]}
    one |= {"hidden_size": 3, "rope": {"factor": 2}, "no_rope_layers": [1, 0, 1]}
    two = {**one, "num_hidden_layers": 2, "layer_types": ["b0", "b1"], "mlp_only_layers": [], "no_rope_layers": [0, 0]}
    made = stacked_config(one, [(one, 1), (one, 2), (two, 0), (two, 1), (one, 0)])
    lists = {
        "layer_types": ["a1", "a2", "b0", "b1", "a0"],
        "mlp_only_layers": [1, 4],
        "no_rope_layers": [0, 1, 0, 0, 1],
    }
    assert made == {**one, "num_hidden_layers": 5, **lists}
    every = {"n_layer": 2, "mlp_only_layers": [0, 1]}
    assert stacked_config(every, [(every, 1), (every, 1), (every, 0)])["mlp_only_layers"] == [0, 1, 2]
    nested = {"text_config": one, "vision_config": {"num_hidden_layers": 9}}
    assert stacked_config(nested, [(nested, 0)])["text_config"]["num_hidden_layers"] == 1
    assert stacked_config(nested, [(nested, 0)])["vision_config"]["num_hidden_layers"] == 9


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (stack("passthrough", [a(0, 5)]), "has no layer 4, only 0 to 3"),
        (stack("passthrough", [a(2, 2)]), "slices.0.sources.0: `layer_range` is [2, 2]"),
        (
            stack("passthrough", [a(0, 2), b(0, 2)]),
            "slices.0: passthrough merges 1 model, not 2; list as many under `sources:`",
        ),
        (stack("linear", [a(0, 2), b(0, 3)], weight=1), "slices.0: its sources have [2, 3] layers"),
        (stack("linear", [a(0, 2), a(1, 3)], weight=1), "slices.0: model 'f32/a' is there twice"),
        (stack("linear", [a(0, 2)], [b(0, 2)]), "slices.0.sources.0: the parameter `weight` is missing"),
        (stack("ties", [a(0, 2)], weight=1, base="f32/base"), "its base 'f32/base' is none of its sources"),
        (stack("ties", [a(0, 2)], weight=1), "slices.0: ties needs a `base_model`"),
        (stack("linear", {"sources": [a(0, 1)], "merge_method": "ties"}), "slices.0: unknown key 'merge_method'"),
        (stack("linear", {"sources": [{**a(0, 1), "layers": 3}]}), "sources.0: unknown key 'layers'"),
        (stack("linear", {"sources": []}), "slices.0: `sources` is missing"),
        ({"merge_method": "linear", "slices": ["f32/a"]}, "slices.0: not a table"),
        ({**stack("linear", [a(0, 1)]), "models": [{"model": "f32/a"}]}, "has both `models` and `slices`"),
        ({"merge_method": "linear", "slices": {}}, "`slices` is no list"),
    ],
)
def test_slices_that_cannot_be_are_refused_in_one_line(shelf: Path, recipe: dict[str, Any], said: str) -> None:
    (shelf / "wrong.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError) as failure:
        api.run_recipe(load_recipe(shelf / "wrong.yml", {}), None, RunOptions())
    assert said in str(failure.value)


def test_models_without_one_tower_of_layers_are_refused(tmp_path: Path, shelf: Path) -> None:
    towers = {f"{side}.layers.0.w.weight": torch.ones(2, 2) for side in ("encoder", "decoder")}
    write_checkpoint(tmp_path / "towers", towers)
    write_checkpoint(tmp_path / "flat", {"w.weight": torch.ones(2, 2)})
    write_adapter(tmp_path / "lora", {"model.layers.0.mlp.up_proj": (torch.ones(1, 16), torch.ones(24, 1))})
    for name, said in {
        "towers": "layers under decoder.layers. and encoder.layers.",
        "flat": "no numbered layers",
        "lora": "is an adapter, which has no layers of its own",
    }.items():
        source = layers_of(str(tmp_path / name))(0, 1)
        recipe = stack("linear", [a(0, 1), source], weight=1) if name == "lora" else stack("passthrough", [source])
        (shelf / "towers.yml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(CheckpointError, match=said):
            api.run_recipe(load_recipe(shelf / "towers.yml", {}), None, RunOptions())


def test_the_plan_counts_the_layers_of_the_output(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shelf / "plan.yml").write_text(yaml.safe_dump(TWO_MODELS))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(shelf / "plan.yml"), "--all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "model.layers.6.mlp.up_proj.weight" in shown
    assert "layers.7" not in shown
