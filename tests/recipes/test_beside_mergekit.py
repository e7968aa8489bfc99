"""Recipes of every method beside mergekit itself, where it is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder
from mergekit_shelf import beside_mergekit, by, by_mergekit, layers_of, make_shelf, merged, model, on, read, stack

from acemerge import api


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


def recipes(d: str) -> dict[str, dict[str, Any]]:
    """One or more for every method without chance."""

    def of(method: str, *models: dict[str, Any], base: bool = True, **parameters: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = {"merge_method": method, "models": list(models), "parameters": parameters}
        return recipe | ({"base_model": f"{d}/base"} if base else {})

    a, b, c = (on(f"{d}/{name}") for name in "abc")
    by_name = [{"filter": "mlp", "value": [0.2, 1, 0.4]}, {"filter": "layers.2", "value": 0.7}]
    return {
        "linear": of("linear", a(weight=0.3), b(weight=1.2), c(weight=0.5), base=False),
        "linear-sum": of("linear", a(weight=by_name), b(weight=[0, 1, 3]), base=False, normalize=False, weight=2),
        "linear-and-base": of("linear", a(), b(weight=3), weight=2),
        "task-arithmetic": of("task_arithmetic", model(f"{d}/base"), a(weight=0.7, density=0.5), b(weight=-0.2)),
        "task-arithmetic-normalised": of(
            "task_arithmetic", a(weight=0.7), b(weight=0.2), normalize=True, **{"lambda": 0.8}
        ),
        "ties": of("ties", a(weight=0.7, density=0.5), b(weight=0.6, density=0.3), c(weight=[0.2, 0.5]), density=0.9),
        "ties-rescaled": of(
            "ties", a(weight=1, density=0.005), b(weight=-0.4), density=0.3, normalize=False, rescale=True
        ),
        "breadcrumbs": of("breadcrumbs", a(weight=1), b(weight=0.4, density=0.95, gamma=0.2), density=0.3),
        "breadcrumbs-ties": of("breadcrumbs_ties", a(weight=1), b(weight=0.4, gamma=0.2), density=0.6),
        "model-stock": of("model_stock", a(), b(), c()),
        "karcher": of("karcher", a(), b(), c(), base=False, max_iter=20),
        "slerp": of(
            "slerp", a(), model(f"{d}/base"), t=[{"filter": "attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.4}]
        ),
        "nuslerp": of("nuslerp", a(weight=0.3), b(weight=0.5), base=False),
        "nuslerp-updates": of("nuslerp", a(weight=0.3), b(weight=0.5)),
        "nuslerp-rows": of("nuslerp", a(weight=0.3), b(weight=0.5), nuslerp_flatten=False),
        "nuslerp-columns": of("nuslerp", a(weight=0.3), b(weight=0.5), nuslerp_flatten=False, nuslerp_row_wise=True),
        "sce": of("sce", a(), b(), c(), select_topk=0.3),
        "arcee-fusion": of("arcee_fusion", a()),
        "passthrough": of("passthrough", a(scale=[{"filter": "down", "value": 0.5}, {"value": 1}]), base=False),
    }


def stacks(d: str) -> dict[str, dict[str, Any]]:
    """Slices: of one model after the other, of several, with gradients, with bases of their own."""
    base, a, b, c = (layers_of(f"{d}/{name}") for name in ("base", "a", "b", "c"))
    halved = [{"filter": "down", "value": 0.5}, {"value": 1}]
    return {
        "passthrough": stack("passthrough", [a(0, 3)], [b(1, 4, scale=halved)]),
        "linear": stack("linear", [a(0, 1), b(0, 1, weight=0)], [a(1, 3)], [b(3, 4), a(3, 4, weight=0.3)], weight=1),
        "ties": stack(
            "ties",
            {"sources": [base(0, 2), a(0, 2, density=[0.2, 0.7]), b(1, 3)], "parameters": {"weight": 0.9}},
            [base(1, 4)],
            {"base_model": f"{d}/c", "sources": [a(0, 3, weight=0.3), c(1, 4)]},
            base=f"{d}/base", density=0.6, weight=0.5,
        ),
        "slerp": stack(
            "slerp",
            [base(0, 3), a(0, 3)],
            {"sources": [base(3, 4), a(3, 4)], "parameters": {"t": 0.3}},
            [a(1, 3), base(1, 3)],
            base=f"{d}/base", t=[0, 0.5, 1],
        ),
        "sce": stack("sce", [base(0, 2), a(0, 2), b(0, 2)], [c(1, 3), base(0, 2)], base=f"{d}/base", select_topk=0.4),
    }  # fmt: skip


def in_float32(recipe: dict[str, Any]) -> dict[str, Any]:
    """Computed in float32 and rounded once, by both."""
    return copy.deepcopy(recipe) | {"dtype": "float32", "out_dtype": "bfloat16"}


# In the models' own bfloat16 mergekit rounds after every step: there only the rules of its task arithmetic, linear
# and slerp are compared, the others where both round once.
IN_BF16 = ("linear", "task-arithmetic", "task-arithmetic-normalised", "ties", "ties-rescaled", "breadcrumbs")
IN_BF16 = (*IN_BF16, "breadcrumbs-ties", "slerp", "passthrough")
CASES = {f"f32-{name}": recipe for name, recipe in recipes("f32").items()}
CASES |= {f"f32-stacked-{name}": recipe for name, recipe in stacks("f32").items()}
CASES |= {f"bf16-{name}": recipe for name, recipe in recipes("bf16").items() if name in IN_BF16}
CASES |= {f"once-{name}": in_float32(recipe) for name, recipe in recipes("bf16").items()}


@pytest.fixture(scope="module")
def theirs(shelf: Path) -> Path:
    """The shelf, with what mergekit makes of every recipe."""
    by_mergekit(shelf, CASES)
    return shelf


@beside_mergekit
@pytest.mark.parametrize("name", CASES)
def test_the_tensors_are_those_of_mergekit(theirs: Path, name: str) -> None:
    expected, found = load_folder(theirs / f"theirs-{name}"), merged(theirs, CASES[name], f"ours-{name}")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        error = (found[key].double() - value.double()).abs()
        if value.dtype == torch.float32:
            assert error.max() <= 1e-6, key
        else:  # one step of the type at the size of the weights that enter
            sizes = [models[key].double().abs() for models in read(theirs, "bf16").values()]
            step = torch.exp2(torch.stack(sizes).amax(0).log2().floor() - 7)
            assert (error <= step).all(), key


@beside_mergekit
def test_mergekit_merges_by_our_rules(shelf: Path) -> None:
    methods = ("ace", "actmat", "tact", "tsv_m", "iso_c", "iso_cts", "wudi", "swudi_a")
    models = [model("f32/a", weight=0.5), model("f32/b")]
    cases = {
        method: {
            "merge_method": method,
            "base_model": "f32/base",
            "models": models,
            "parameters": {"eps": 2e-4} if method == "ace" else {},
        }
        for method in methods
    }
    source = str(Path(api.__file__).parent.parent)
    by_mergekit(shelf, cases, before="import acemerge.integrations.mergekit", path=source)
    values = read(shelf)
    for method in methods:
        found = load_folder(shelf / f"theirs-{method}")
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
            D = torch.stack([values[key][name] - values["base"][name] for key in "ab"])
            rule, params = (method, {"eps": 2e-4} if method == "ace" else {}) if "mlp" in name else ("average", {})
            expected = values["base"][name] + by(rule, D, [0.5, 1.0], **params)
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=f"{method} {name}")
