"""Merging state dicts, modules and task vectors in memory: the same arguments as for folders, and a report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import PlainModel, load_folder
from torch import Tensor, nn

import acemerge
from acemerge.errors import ResourceError, UsageError
from acemerge.methods import METHODS, make

RULES = [{"match": "*.down.*", "action": "base"}]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_seed_rules_and_type_mean_what_they_mean_for_folders(plain: PlainModel) -> None:
    options: dict[str, Any] = {"weights": [2, 0.5, 1], "seed": 7, "rules": RULES, "p": 0.3}
    merged = acemerge.merge_state_dicts(plain.base, plain.tuned, "dare_linear", compute_dtype=torch.float64, **options)
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, "dare_linear", out, compute_dtype="float64", **options)
    assert same(merged, load_folder(out))
    assert torch.equal(merged["layers.0.down.weight"], plain.base["layers.0.down.weight"])
    assert not same(merged, acemerge.merge_state_dicts(plain.base, plain.tuned, "dare_linear", **options | {"seed": 8}))


@pytest.mark.parametrize("name", ["ace", "svc"])
def test_a_rule_may_be_a_name_a_table_or_itself(plain: PlainModel, name: str) -> None:
    params = {"ace": {"eps": 1e-3}, "svc": {"over": {"name": "ties", "keep": 0.5}}}[name]
    rule, table = make(name, params), {"name": name, **params}
    deltas = torch.randn(3, 6, 4)
    expected = acemerge.merge_deltas(deltas, name, **params).delta
    for method in (table, rule):
        assert torch.equal(acemerge.merge_deltas(deltas, method).delta, expected)
        merged = [
            acemerge.merge_state_dicts(plain.base, plain.tuned, m, **p) for m, p in ((method, {}), (name, params))
        ]
        assert same(*merged)
    scaled = acemerge.merge_deltas(deltas, rule, scale=0.5).delta
    torch.testing.assert_close(scaled, 0.5 * expected)


def test_an_instance_need_not_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = make("average", {})
    deltas = torch.randn(3, 6, 4)
    monkeypatch.delitem(METHODS, "average")
    torch.testing.assert_close(acemerge.merge_deltas(deltas, rule).delta, deltas.mean(0))


def test_a_report_comes_beside_the_model_when_asked(plain: PlainModel) -> None:
    merged, report = acemerge.merge_state_dicts(plain.base, plain.tuned, "ace", weights=[1, 2, 1], report=True)
    assert same(merged, acemerge.merge_state_dicts(plain.base, plain.tuned, "ace", weights=[1, 2, 1]))
    assert report.out is None
    assert report.tensors["layers.0.up.weight"]["rule"] == "ace"
    assert report.manifest["recipe"]["experts"][1]["weight"] == 2
    assert len(repr(report).splitlines()) == 5
    assert "6 (3 by average, 2 by ace, 1 by base)" in repr(report)


def test_modules_take_the_same(plain: PlainModel) -> None:
    torch.manual_seed(0)
    base, *experts = (nn.Sequential(nn.Linear(4, 3)) for _ in range(3))
    model, report = acemerge.merge_models(base, experts, "average", weights=[3, 1], report=True)
    W0, W1, W2 = (m[0].weight for m in (base, *experts))
    torch.testing.assert_close(model[0].weight, (W0 + (3 * (W1 - W0) + (W2 - W0)) / 4))
    assert set(report.tensors) == {"0.weight", "0.bias"}
    assert isinstance(acemerge.merge_models(base, experts, "average"), nn.Sequential)


def test_arrays_and_lists_are_task_vectors_too() -> None:
    deltas = torch.randn(3, 6, 4, dtype=torch.float64)
    read_only = deltas.numpy().copy()
    read_only.flags.writeable = False
    expected = acemerge.merge_deltas(deltas, "ace").delta
    for given in (list(deltas), read_only, list(read_only), tuple(deltas), [deltas[0], read_only[1], deltas[2]]):
        assert torch.equal(acemerge.merge_deltas(given, "ace").delta, expected)
    base = np.ones((6, 4))
    halfway = acemerge.merge_deltas(read_only[:2], "slerp", base=base).delta
    assert torch.equal(halfway, acemerge.merge_deltas(deltas[:2], "slerp", base=torch.tensor(base)).delta)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "deltas: .* of shape \\[0\\]"),
        ([torch.ones(2, 3), torch.ones(3, 2)], r"deltas: are of shapes \(2, 3\), \(3, 2\); give those of one layer"),
        ("abc", "deltas: str is no array"),
        ([[1, 2], ["a"]], "deltas: list is no array"),
    ],
)
def test_what_are_no_task_vectors(deltas: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        acemerge.merge_deltas(deltas, "average")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "weights: 1 weights for 3 experts"),
        ({"method": {"eps": 1}}, "'method.name' is missing"),
        ({"compute_dtype": torch.bfloat16}, "'compute_dtype'"),
        ({"rules": [{"match": "*", "methd": "ace"}]}, "did you mean `method`"),
    ],
)
def test_wrong_options(plain: PlainModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        acemerge.merge_state_dicts(plain.base, plain.tuned, **{"method": "ace", **options})


@pytest.mark.parametrize("said", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_has_a_cure_that_holds_in_memory(
    said: Exception, plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is there to be resumed, and float64 would take twice as much."""

    def merge(*_: object) -> None:
        raise said

    monkeypatch.setattr(METHODS["tsv_m"], "merge", merge)
    cure = "there is not enough memory; allow more, or merge folders, which are read piece by piece$"
    with pytest.raises(ResourceError, match=cure):
        acemerge.merge_deltas(torch.randn(3, 6, 4), "tsv_m")
    with pytest.raises(ResourceError, match=cure):
        acemerge.merge_state_dicts(plain.base, plain.tuned, "tsv_m")
