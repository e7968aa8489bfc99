"""Experts with an adapter applied to them, as `PATH+LORA` in a mergekit recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import load_folder, write_adapter
from mergekit_shelf import beside_mergekit, by_mergekit, layers_of, make_shelf, merged, model, read, stack
from safetensors.torch import load_file
from torch import Tensor

from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.verify import verify
from acemerge.recipes.recipe import load_recipe, make_recipe

MODULES = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llamas, and the adapters `x` and `y` on two modules of every layer, with alpha 3 and rank 2."""
    root, generator = make_shelf(tmp_path_factory.mktemp("shelf")), torch.Generator().manual_seed(3)
    for name in "xy":
        factors = {
            f"model.layers.{i}.{module}": tuple(
                0.3 * torch.randn(shape, generator=generator) for shape in ((2, inputs), (outputs, 2))
            )
            for i in range(4)
            for module, (outputs, inputs) in MODULES.items()
        }
        write_adapter(root / name, factors, lora_alpha=3)  # type: ignore[arg-type]
    return root


def applied(shelf: Path, name: str, adapter: str) -> dict[str, Tensor]:
    """The oracle: `W + 3/2 B A` in float64."""
    factors = load_file(shelf / adapter / "adapter_model.safetensors")
    weights = {key: value.double() for key, value in read(shelf)[name].items()}
    for key in weights:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            weights[key] += 1.5 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    return weights


def test_an_adapter_is_applied_to_its_own_model(shelf: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "f32/base",
        "models": [model("f32/a+x", weight=0.5), model("f32/base+y", weight=2)],
    }
    found, W0 = merged(shelf, recipe), {name: value.double() for name, value in read(shelf)["base"].items()}
    one, two = applied(shelf, "a", "x"), applied(shelf, "base", "y")
    for name, value in found.items():
        expected = W0[name] + 0.5 * (one[name] - W0[name]) + 2 * (two[name] - W0[name])
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)


def test_the_manifest_knows_the_adapters_and_their_files(shelf: Path) -> None:
    merged(
        shelf, {"merge_method": "linear", "models": [model("f32/a+x", weight=1), model("f32/a+y", weight=1)]}, "told"
    )
    manifest = verify(shelf / "told")
    assert manifest["experts"] == ["x", "y"]
    assert manifest["adapters"] == dict.fromkeys("xy", "LoRA adapter, rank 2, 8 tensors")
    files = {given["path"]: sorted(given["files"]) for given in manifest["inputs"]}
    assert files == {
        str(shelf / "f32/a"): ["model.safetensors"],
        str(shelf / "x"): ["adapter_config.json", "adapter_model.safetensors"],
        str(shelf / "y"): ["adapter_config.json", "adapter_model.safetensors"],
    }


def test_layers_of_models_with_adapters_are_stacked(shelf: Path) -> None:
    slices = [[layers_of("f32/a+x")(0, 2)], [layers_of("f32/b+y")(1, 4)]]
    found = merged(shelf, stack("passthrough", *slices), "stacked")
    one, two = applied(shelf, "a", "x"), applied(shelf, "b", "y")
    for name, value in found.items():
        number = int(name.split(".")[2]) if "layers." in name else None
        whose = one if "embed" in name or (number is not None and number < 2) else two
        there = name if number is None or number < 2 else name.replace(f"layers.{number}.", f"layers.{number - 1}.")
        torch.testing.assert_close(value.double(), whose[there], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model": "f32/base+x"}, "an adapter on the base, as in 'f32/base+x', is not supported yet"),
        ({"models": [model("f32/a+x+y", weight=1)]}, "'f32/a+x+y' is no `PATH` nor `PATH+LORA`; name one adapter"),
        ({"models": [model("f32/a+", weight=1)]}, "'f32/a+' is no `PATH`"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shelf: Path, change: dict[str, Any], said: str) -> None:
    recipe = {"merge_method": "ties", "base_model": "f32/base", "models": [model("f32/a+x", weight=1)]}
    (shelf / "wrong.yml").write_text(yaml.safe_dump(recipe | change))
    with pytest.raises(UsageError) as failure:
        load_recipe(shelf / "wrong.yml", {})
    assert said in str(failure.value)


@pytest.mark.parametrize(("one", "adapter"), [("f32/a", "f32/b"), ("x", "y")])
def test_what_is_no_model_or_no_adapter_is_refused(shelf: Path, one: str, adapter: str) -> None:
    expert = {"model": str(shelf / one), "adapter": str(shelf / adapter)}
    with pytest.raises(CheckpointError, match=r"is (no|an) adapter; name both, .* as MODEL\+ADAPTER$"):
        open_recipe(make_recipe({"base": str(shelf / "f32/base"), "experts": [expert]}), None, RunOptions())


CASES = {
    "linear": {
        "merge_method": "linear",
        "models": [model("f32/a+x", weight=1), model("f32/a+y", weight=2), model("f32/b", weight=3)],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "f32/base+x",
        "models": [model("f32/base+x"), model("f32/b+y")],
        "parameters": {"t": 0.3},
    },
    "passthrough": stack("passthrough", [layers_of("f32/a+x")(0, 3)], [layers_of("f32/b+y")(1, 4)]),
}


@pytest.fixture(scope="module")
def theirs(shelf: Path) -> Path:
    by_mergekit(shelf, CASES)
    return shelf


@beside_mergekit
@pytest.mark.parametrize("name", CASES)
def test_the_tensors_are_those_of_mergekit(theirs: Path, name: str) -> None:
    expected, found = load_folder(theirs / f"theirs-{name}"), merged(theirs, CASES[name], f"ours-{name}")
    assert expected.keys() == found.keys()
    assert max((found[key] - value).abs().max() for key, value in expected.items()) <= 1e-6
