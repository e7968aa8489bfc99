"""Small layers that are merged as a stack: the same as one by one, whatever else is in the stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conformance import RULES
from crossed import crossed, spread
from oracles import relative_error, task_vectors
from torch import Tensor

from acemerge.checkpoints.header import TensorSpec
from acemerge.engine.batched import compute_all, stacks
from acemerge.engine.compute import Computed, compute
from acemerge.engine.work import Place, Setting
from acemerge.errors import AcemergeError, CheckpointError
from acemerge.methods import METHODS, Layer, Method, Together, expert_seeds, make
from acemerge.methods.ace import Ace
from acemerge.methods.status import Status
from acemerge.models.roles import Role
from acemerge.planning.jobs import Input, Merge
from acemerge.planning.pieces import Piece
from acemerge.recipes.recipe import make_recipe

CPU = torch.device("cpu")
STACKED = [name for name, cls in METHODS.items() if issubclass(cls, Together)]
UNEVEN = torch.tensor([1.0, 30.0, 0.03])[:, None, None]


def _layers(T: int = 3, shape: tuple[int, int] = (12, 8)) -> Tensor:
    """Layers of every kind that a rule treats in its own way, (P, T, out, in), in float64."""
    plain = torch.stack([task_vectors(T, shape, seed=seed) for seed in range(4)])
    frozen, still, narrow, alike = plain.clone()
    thin = plain[:2, :, :, :1] @ plain[2:, :, :1]  # of rank T together: singular but for rounding
    tied = torch.ones_like(frozen)  # most entries elect minus, and the first column is a tie
    tied[1:] = 0
    tied[1:2] -= 1
    tied[0, :, 1:] = -1
    frozen[0] = 0
    still[:] = 0
    narrow[..., 1:] = 0  # no expert moved in the other directions
    alike[:, 1:] = alike[:, :1]  # rows are alike: nothing is left of them when they are centred
    return torch.stack([*plain, plain[0] * UNEVEN[:T], frozen, still, narrow, alike, *thin, tied])


def _layer(i: int, T: int = 3) -> Layer:
    return Layer(torch.ones(T, dtype=torch.float64), expert_seeds(0, f"layer {i}", range(T)))


SETTINGS = [*((name, {}) for name in STACKED), ("actmat", {"lam": 0.01, "p": 1})]


@crossed(
    **{"name,params": [pytest.param(*setting, id=str(setting)) for setting in SETTINGS]},
    shape=[(12, 8), (8, 12), (3, 20)],  # the last is solved in the space of its rows
    dtype=[torch.float64, torch.float32],
)
def test_a_stack_is_what_each_layer_is_alone(
    name: str, params: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rule = make(name, params)
    assert isinstance(rule, Together)
    stack = _layers(shape=shape).to(dtype)
    layers = [_layer(i) for i in range(len(stack))]
    found = rule.merge_together(stack.clone(), layers)
    for D, layer, result in zip(stack, layers, found, strict=True):
        alone = rule.merge(D.double(), layer)
        assert relative_error(result.delta, alone.delta) < {torch.float64: 1e-9, torch.float32: 1e-6}[dtype]
        assert result.delta.dtype == dtype
        same = {key: value for key, value in alone.stats.items() if key not in ("condition", "gamma", "heterogeneity")}
        assert {key: result.stats[key] for key in same} == same
        if alone.stats.get("condition", float("inf")) < 1e6:
            assert result.stats["condition"] == pytest.approx(alone.stats["condition"], rel=1e-3)


@pytest.mark.parametrize("name", STACKED)
def test_a_layer_becomes_the_same_bytes_in_any_stack(name: str) -> None:
    rule = make(name, {})
    assert isinstance(rule, Together)
    stack, layers = _layers().float(), [_layer(i) for i in range(12)]
    whole = rule.merge_together(stack, layers)
    for part in (slice(0, 1), slice(2, 5), slice(4, 12)):
        some = rule.merge_together(stack[part], layers[part])
        assert all(torch.equal(a.delta, b.delta) for a, b in zip(some, whole[part], strict=True))
        assert [a.stats for a in some] == [b.stats for b in whole[part]]


# --- pieces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    models: Sequence[Mapping[str, Tensor]]

    def take(self, wanted: Input) -> Tensor:
        model, name = wanted
        return self.models[model][name]

    def release(self, model: int) -> None:
        pass


class _Model:
    """Twelve small layers of a base and its experts, and the jobs to merge them."""

    def __init__(self, method: str, T: int = 3, dtype: torch.dtype = torch.bfloat16, **job: Any) -> None:
        deltas = _layers(T)
        names = [f"layer {i}" for i in range(len(deltas))]
        generator = torch.Generator().manual_seed(1)
        bases = torch.randn(deltas.shape[0], *deltas.shape[2:], generator=generator, dtype=torch.float64)
        if job.get("transposed"):
            bases, deltas = bases.mT, deltas.mT
        self.models = [
            dict(zip(names, (W.to(dtype) for W in weights), strict=True))
            for weights in (bases, *(bases + deltas[:, t] for t in range(T)))
        ]
        rule = make(method, dict(RULES[method].params))
        recipe = make_recipe({"base": "b", "experts": [str(t) for t in range(T)]}, "test")
        thresholds = {} if rule.needs.keep is None else {-1: [0.05] * T}
        self.setting = Setting(recipe, [str(t) for t in range(T)], thresholds)
        self.pieces = [self._piece(name, rule, T, job) for name in names]

    def _piece(self, name: str, rule: Method, T: int, job: dict[str, Any]) -> Piece[Merge]:
        value = self.models[0][name]
        spec = TensorSpec(name, value.dtype, tuple(value.shape))
        return Piece(Merge(spec, Role("linear"), "test", (name,) * T, method=rule, weights=(1.0,) * T, **job))

    def merged(self, numbers: Sequence[int] | None = None) -> list[Computed]:
        chosen = self.pieces if numbers is None else [self.pieces[i] for i in numbers]
        return compute_all([(piece, _Values(self.models)) for piece in chosen], self.setting, Place(CPU))

    def alone(self) -> list[Computed]:
        return [compute(piece, _Values(self.models), self.setting, Place(CPU)) for piece in self.pieces]


@spread(name=RULES, transposed=[False, True])
def test_pieces_together_are_what_they_are_alone(name: str, transposed: bool) -> None:
    model = _Model(name, min(3, RULES[name].experts), torch.float64, transposed=transposed, compute_dtype=torch.float64)
    for together, alone in zip(model.merged(), model.alone(), strict=True):
        assert relative_error(together.value, alone.value) < 1e-12
        assert together.record.stats.statuses == alone.record.stats.statuses
        assert together.record.energies == pytest.approx(alone.record.energies)
        assert together.record.to_json().keys() == alone.record.to_json().keys()
        assert len(together.masks) == len(alone.masks)


@pytest.mark.parametrize("name", ["average", "ties", "ace", "della"])
def test_a_piece_becomes_the_same_bytes_in_any_batch(name: str) -> None:
    model = _Model(name)
    whole = model.merged()
    for numbers in ([3], [0, 4, 9], [9, 1, 6, 2]):
        some = model.merged(numbers)
        assert all(torch.equal(c.value, whole[i].value) for c, i in zip(some, numbers, strict=True))


def test_a_layer_that_did_not_move_keeps_its_bytes() -> None:
    model = _Model("ace")
    model.models[0]["layer 6"].view(-1)[0] = -0.0
    for expert in model.models[1:]:
        expert["layer 6"] = model.models[0]["layer 6"]
    still = model.merged()[6]
    assert torch.equal(still.value.view(torch.int16), model.models[0]["layer 6"].view(torch.int16))
    assert still.record.stats.statuses == (Status.NO_UPDATE,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_stack_is_named_or_left_out(value: float) -> None:
    model = _Model("ace")
    clean = model.merged()
    model.models[2]["layer 3"][4, 5] = value
    with pytest.raises(CheckpointError, match=rf"expert 1: tensor 'layer 3' is {value} at \[4, 5\]"):
        model.merged()
    skipping = model.setting.recipe.model_copy(update={"nonfinite": "skip-expert"})
    model.setting = replace(model.setting, recipe=skipping)
    found = model.merged()
    assert found[3].record.skipped_experts == ("1",)
    assert all(torch.equal(a.value, b.value) for i, (a, b) in enumerate(zip(found, clean, strict=True)) if i != 3)


def test_a_result_out_of_range_is_told_of_its_tensor() -> None:
    model = _Model("task_arithmetic", dtype=torch.float16)
    model.models[0]["layer 2"][0, 0] = 65504
    for expert in model.models[1:]:
        expert["layer 2"][0, 0] = 65504
        expert["layer 2"][1, 1] = 60000
    rule = make("task_arithmetic", {"scale": 1.0})
    model.pieces = [replace(piece, job=replace(piece.job, method=rule)) for piece in model.pieces]
    with pytest.raises(AcemergeError, match=r"'layer 2': its largest magnitude .* overflows float16"):
        model.merged()


def test_layers_of_a_stack_that_fails_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Model("ace")
    expected = [c.value for c in model.alone()]

    def fail(*_: object) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(Ace, "merge_together", fail)
    assert all(torch.equal(c.value, value) for c, value in zip(model.merged(), expected, strict=True))


def test_stacks_are_of_small_pieces_that_are_alike() -> None:
    small, other = _Model("ace").pieces[:4], _Model("average").pieces[:2]

    def of_side(name: str, side: int) -> Piece[Merge]:
        return Piece(replace(small[0].job, spec=TensorSpec(name, torch.bfloat16, (side, side))))

    large, halves = of_side("large", 300), [of_side("half", 180), of_side("other half", 180)]
    fused = replace(small[0], job=replace(small[0].job, copies=((0, "again"),)))
    pieces = [small[0], large, small[1], *halves, other[0], fused, small[2], other[1], small[3]]
    assert sorted(stacks(pieces)) == [[0, 2, 7, 9], [1], [3, 4], [5, 8], [6]]
