"""mergekit recipes against formulas written here; beside mergekit itself: test_beside_mergekit.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import load_folder
from mergekit_shelf import by, make_shelf, merged, model, read
from torch import Tensor

from acemerge import METHODS, api
from acemerge.cli.app import main
from acemerge.errors import UsageError
from acemerge.methods import Layer
from acemerge.recipes.recipe import load_recipe


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


def test_linear_is_the_weighted_mean_of_the_models(shelf: Path) -> None:
    models = read(shelf)
    found = merged(shelf, {"merge_method": "linear", "models": [model("f32/a", weight=1), model("f32/b", weight=3)]})
    for name, value in found.items():
        expected = 0.25 * models["a"][name].double() + 0.75 * models["b"][name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=3e-7)


def test_linear_without_normalisation_is_the_sum_even_of_equal_models(shelf: Path) -> None:
    recipe = {"merge_method": "linear", "parameters": {"normalize": False}}
    found = merged(shelf, recipe | {"models": [model("f32/a", weight=0.5), model("f32/a", weight=1.0)]})
    for name, value in read(shelf)["a"].items():
        torch.testing.assert_close(found[name], 1.5 * value, rtol=0, atol=3e-7)


def test_linear_merges_the_base_with_the_others(shelf: Path) -> None:
    models, some = read(shelf), [model("f32/a", weight=1), model("f32/b", weight=4)]
    found = merged(
        shelf, {"merge_method": "linear", "base_model": "f32/base", "models": some, "parameters": {"weight": 3}}
    )
    for name, value in found.items():
        expected = (models["a"][name] + 4 * models["b"][name] + 3 * models["base"][name]) / 8
        torch.testing.assert_close(value, expected, rtol=0, atol=3e-7)


def test_gradients_and_filters_are_resolved_for_every_tensor(shelf: Path) -> None:
    models = read(shelf)
    cases = [{"filter": "mlp", "value": [0.5, 1.5]}, {"filter": "layers.2", "value": 0.7}]
    found = merged(
        shelf,
        {
            "merge_method": "task_arithmetic",
            "base_model": "f32/base",
            "models": [model("f32/base"), model("f32/a", weight=cases), model("f32/b", weight=[0.0, 1.0, 3.0])],
            "parameters": {"weight": 2, "lambda": 0.5},
        },
    )
    slopes = {"layers.0": 0.0, "layers.1": 2 / 3, "layers.2": 1 + 2 / 3, "layers.3": 3.0}
    for name, value in found.items():
        layer = next((key for key in slopes if key in name), "none")
        a = 0.5 + int(layer[-1]) / 3 if "mlp" in name else 0.7 if layer == "layers.2" else 2.0
        W0, Wa, Wb = (models[key][name].double() for key in ("base", "a", "b"))
        expected = W0 + 0.5 * (a * (Wa - W0) + slopes.get(layer, 0.0) * (Wb - W0))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)


def test_ties_trims_exactly_and_divides_by_signed_weights(shelf: Path) -> None:
    models = read(shelf)
    found = merged(
        shelf,
        {
            "merge_method": "ties",
            "base_model": "f32/base",
            "models": [model("f32/a", weight=1.0, density=0.5), model("f32/b", weight=-0.4, density=0.3)],
        },
    )
    for name, value in found.items():
        W0 = models["base"][name].double()
        parts = []
        for key, weight, density in (("a", 1.0, 0.5), ("b", -0.4, 0.3)):
            D = (models[key][name] - models["base"][name]).double()
            kept = D.abs().flatten().sort(descending=True).indices[: int(density * D.numel())]
            mask = torch.zeros(D.numel(), dtype=torch.float64).index_fill(0, kept, 1.0).view_as(D)
            parts.append((weight * D * mask, weight))
        elected = torch.where(sum(part for part, _ in parts) >= 0, 1.0, -1.0)
        total = sum(part * (part.sign() == elected) for part, _ in parts)
        divisor = sum(weight * (part.sign() == elected).double() for part, weight in parts)
        expected = W0 + total / torch.where(divisor == 0, 1.0, divisor)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)


def test_rescaling_restores_the_l1_norm() -> None:
    D = torch.randn(1, 50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    M = by("mergekit_sum", D, trim="random", density=0.3, rescale=True)
    kept = M != 0
    assert abs(kept.double().mean() - 0.3) < 0.05
    torch.testing.assert_close(M.abs().sum(), D.abs().sum())
    torch.testing.assert_close(M[kept] / D[0][kept], torch.full_like(M[kept], float(M[kept][0] / D[0][kept][0])))


def test_della_keeps_large_entries_more_often() -> None:
    D = torch.arange(1.0, 10.0, dtype=torch.float64).repeat(1, 20_000, 1)
    shares = (by("mergekit_sum", D, trim="by_rank", density=0.5, epsilon=0.3) != 0).double().mean(0)
    torch.testing.assert_close(shares, torch.linspace(0.2, 0.8, 9, dtype=torch.float64), rtol=0, atol=0.015)


def test_breadcrumbs_drops_both_ends_and_keeps_the_density() -> None:
    D = torch.arange(1.0, 21.0, dtype=torch.float64).view(1, 4, 5)
    M = by("mergekit_sum", D, trim="middle", density=0.5, gamma=0.2).flatten()
    assert M.nonzero().flatten().tolist() == list(range(6, 16))
    full = by("mergekit_sum", D, trim="middle", density=0.9, gamma=0.2).flatten()
    assert full.nonzero().flatten().tolist() == list(range(18))  # fewer large ones go, that 0.9 stay


def test_slerp_counts_a_zero_tensor_as_orthogonal() -> None:
    D = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    M = by("mergekit_slerp", torch.stack([torch.zeros_like(D), D]), weights=[0.6, 0.4])
    torch.testing.assert_close(M, D * torch.sin(torch.tensor(0.4 * torch.pi / 2, dtype=torch.float64)))


def test_slerp_of_rows_and_columns() -> None:
    X, Y = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def slerp(x: Tensor, y: Tensor) -> Tensor:
        angle = torch.arccos(x @ y / (x.norm() * y.norm()))
        return (torch.sin(0.25 * angle) * x + torch.sin(0.75 * angle) * y) / torch.sin(angle)

    rows = torch.stack([slerp(x, y) for x, y in zip(X, Y, strict=True)])
    columns = torch.stack([slerp(x, y) for x, y in zip(X.T, Y.T, strict=True)]).T
    for along, expected in (("rows", rows), ("columns", columns)):
        found = by("mergekit_slerp", torch.stack([X, Y]), weights=[1.0, 3.0], of="updates", along=along)
        torch.testing.assert_close(found, expected)


def test_sce_keeps_what_differs_and_weighs_by_energy() -> None:
    D = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    spread = D.var(0, unbiased=False)
    chosen = spread >= spread.flatten().sort(descending=True).values[11]  # int(0.3 * 40) = 12 of them
    kept = D * chosen
    w = kept.square().sum((1, 2)) / kept.square().sum()
    agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    divisor = (w.view(3, 1, 1) * agree).sum(0)
    expected = (w.view(3, 1, 1) * kept * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(by("mergekit_sce", D, select=0.3), expected)


def test_model_stock_counts_an_expert_that_did_not_move() -> None:
    D = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    D[1] = 0
    torch.testing.assert_close(by("model_stock", D), D[0])
    torch.testing.assert_close(by("model_stock", D, still="count"), torch.zeros_like(D[0]))


def test_arcee_fusion_keeps_the_changes_that_stand_out() -> None:
    """Quartiles from a sort, divergences by torch's own function; a vector is one row."""
    generator = torch.Generator().manual_seed(7)
    for shape in ((40, 30), (50,), (3, 6, 8)):
        W0, D = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
        p, q = (W0 + D).softmax(-1) + 1e-8, W0.softmax(-1) + 1e-8
        S = D.abs() * torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1, keepdim=True)
        ranked = S.flatten().sort().values
        low, middle, high = (ranked[int(share * (len(ranked) - 1))] for share in (0.25, 0.5, 0.75))
        kept = (middle + 1.5 * (high - low)) <= S
        assert 0 < kept.sum() < kept.numel() / 3
        layer = Layer(torch.ones(1, dtype=torch.float64), (0,), base=W0)
        torch.testing.assert_close(METHODS["arcee_fusion"]().merge(D[None], layer).delta, D * kept)


TIES = {
    "merge_method": "ties",
    "base_model": "f32/base",
    "models": [model("f32/a", weight=1), model("f32/b", weight=1)],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters": {"densty": 0.5}}, "parameters: unknown key 'densty'; did you mean `density`?"),
        ({"dtyp": "float32"}, "unknown key 'dtyp'; did you mean `dtype`?"),
        (
            {"rules": []},
            "`rules` is a key of acemerge's own recipes, and this is one of mergekit; write the merge as one",
        ),
        ({"models": [{"model": "f32/a", "parameter": {}}]}, "models.0: unknown key 'parameter'; did you mean"),
        ({"models": [model("f32/a", gamma=1)]}, "models.0: unknown key 'gamma'"),
        ({"models": [model("f32/a")]}, "models.0: the parameter `weight` is missing"),
        ({"models": [model("f32/a", weight={"filter": "mlp", "value": 1})]}, "`weight` is missing for tensor"),
        ({"models": [model("f32/a", weight={"filter": "mlp", "value": 1})]}, "entry with `value:` and no `filter:`"),
        ({"models": [model("f32/a", weight="much")]}, "models.0.weight: 'much' is no number"),
        ({"models": [model("f32/a", weight=[])]}, "models.0.weight: [] is no gradient"),
        ({"models": []}, "`models` is missing"),
        ({"base_model": None}, "ties needs a `base_model`"),
        ({"merge_method": "tie"}, "merge_method 'tie' is not supported yet; did you mean `ties`?"),
        ({"merge_method": "nearswap", "parameters": {"t": 1}}, "models.0: unknown key 'weight'; a model has"),
        ({"merge_method": "nearswap", "models": [model("f32/a")]}, "the parameter `t` is missing"),
        ({"modules": {"default": {}}}, "`modules` is not supported yet"),
        ({"chat_template": "chatml"}, "`chat_template: 'chatml'` is neither auto nor a template's text"),
        ({"dtype": "float64"}, "`dtype: float64` is not supported yet"),
        ({"parameters": {"density": 1.5}}, "parameter 'density"),
        ({"parameters": {"normalize": 3}}, "`normalize` is 3"),
        (
            {"merge_method": "slerp", "models": [model("f32/a"), model("f32/b")]},
            "2 models, the base among them, not 3; list",
        ),
        ({"base_model": ["f32/base"]}, "`base_model` is not one path; write `base_model: PATH`"),
    ],
)
def test_what_is_wrong_or_not_supported_is_said_in_one_line(shelf: Path, change: dict[str, Any], said: str) -> None:
    path = shelf / "wrong.yml"
    path.write_text(yaml.safe_dump({**TIES, **change}))
    with pytest.raises(UsageError) as failure:
        load_recipe(path, {})
    assert said in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("option", [["--method", "ace"], ["--set", "eps=1"], ["--base", "x"], ["--scale", "2"]])
def test_options_that_change_the_rules_do_not_go_with_it(
    shelf: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    path = shelf / "options.yml"
    path.write_text(yaml.safe_dump(TIES))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(path), *option])
    assert stop.value.code == 2
    assert f"{option[0]} does not go with a mergekit recipe" in capsys.readouterr().err


def test_weights_of_a_rule_replace_the_experts(shelf: Path) -> None:
    models = read(shelf)
    name, rest = "model.norm.weight", "lm_head.weight"
    report = api.merge(
        shelf / "f32/base",
        [shelf / "f32/a", shelf / "f32/b"],
        "average",
        shelf / "weighted",
        rules=[{"match": name, "method": "average", "weights": [1, 3]}],
        embeddings="rule",
        overwrite=True,
    )
    found = load_folder(shelf / "weighted")
    torch.testing.assert_close(found[name], 0.25 * models["a"][name] + 0.75 * models["b"][name])
    torch.testing.assert_close(found[rest], 0.5 * models["a"][rest] + 0.5 * models["b"][rest])
    assert report.manifest["recipe"]["rules"][0]["weights"] == [1.0, 3.0]


def test_a_rule_needs_as_many_weights_and_densities_as_there_are_experts(shelf: Path) -> None:
    for rule in (
        {"match": "*", "method": "average", "weights": [1]},
        {"match": "*", "method": {"name": "mergekit_sum", "trim": "largest", "density": [0.5, 0.5, 0.5]}},
    ):
        with pytest.raises(UsageError):
            api.merge(shelf / "f32/base", [shelf / "f32/a", shelf / "f32/b"], rules=[rule])


def test_the_rules_are_listed() -> None:
    assert {"mergekit_linear", "mergekit_sum", "mergekit_slerp", "mergekit_sce", "arcee_fusion"} <= METHODS.keys()
    assert {"mergekit_multislerp", "mergekit_nearswap", "mergekit_ram"} <= METHODS.keys()


def test_without_mergekit_the_integration_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.delitem(sys.modules, "acemerge.integrations.mergekit", raising=False)
    with pytest.raises(UsageError, match=r"mergekit: is not installed; pip install 'mergekit==0.1.5'"):
        importlib.import_module("acemerge.integrations.mergekit")
