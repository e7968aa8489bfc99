"""Adapters as experts keep their low rank in the engine: their factors are merged, no task vector is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder, make_model, write_adapter, write_checkpoint
from oracles import EXACT, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.lora import open_expert
from acemerge.engine.compute import compute
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.engine.work import Place, Setting
from acemerge.planning.costs import cost, operations
from acemerge.planning.jobs import Plan
from acemerge.planning.pieces import Piece
from acemerge.recipes.recipe import make_recipe

LAYER = "layers.0.up"
OUT, IN, RANKS = 96, 64, (3, 2, 4)
RULES: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task_arithmetic", {}),
    ("ace", {"eps": 1e-2}),
    ("ace", {"eps": 1e-2, "tau": -1.0, "k_frac": 0.1}),
    ("ace_auto", {}),
    ("anchored", {}),
    ("kron", EXACT["kron"]),
    ("kron_auto", EXACT["kron_auto"]),
    ("trust", {"over": "tsv_m", "step": 0.1}),
    ("actmat", {"lam": 1e-2}),
    ("swudi_a", {}),
    ("tsv_m", {}),
    ("iso_c", {}),
    ("knots", {}),
    ("core_space", {}),
]
over_rules = pytest.mark.parametrize(("rule", "params"), RULES, ids=[f"{rule} {params}" for rule, params in RULES])


class Trained:
    """A base of one layer and three adapters of it, alpha twice the rank, with what they stand for."""

    def __init__(self, root: Path, ranks: tuple[int, ...] = RANKS, frozen: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.W0 = draw(OUT, IN)
        self.base = write_checkpoint(root / "base", {f"{LAYER}.weight": self.W0})
        A = draw(max(ranks), IN)
        self.factors = [(A[:r] if frozen else draw(r, IN), (0.2 + 0.1 * t) * draw(OUT, r)) for t, r in enumerate(ranks)]
        self.adapters = [
            write_adapter(root / f"a{t}", {LAYER: pair}, lora_alpha=2 * ranks[t]) for t, pair in enumerate(self.factors)
        ]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """U and V of the task vectors."""
        return [(2 * B, A) for A, B in self.factors]

    def deltas(self) -> Tensor:
        return torch.stack([U.double() @ V.double() for U, V in self.pairs])

    def plan(self, rule: str, adapters: list[Path] | None = None, **params: Any) -> Plan:
        content = {"base": str(self.base), "experts": [str(a) for a in adapters or self.adapters]}
        recipe = make_recipe({**content, "method": {"name": rule, **params}})
        return open_recipe(recipe, None, RunOptions()).plan


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


# --- the result ----------------------------------------------------------------------------------------------


@over_rules
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]], ids=["", "weighted"])
def test_a_merge_is_the_base_and_what_the_factors_give(
    rule: str, params: dict[str, Any], weights: list[float] | None, trained: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = acemerge.merge(trained.base, trained.adapters, rule, out, weights=weights, **params)
    found = load_folder(out)[f"{LAYER}.weight"] - trained.W0.double()
    from_factors = acemerge.merge_factors(trained.pairs, rule, weights=weights, base=trained.W0, **params)
    assert relative_error(found, from_factors.delta()) < 1e-6
    full = acemerge.merge_deltas(trained.deltas(), rule, weights=weights, base=trained.W0, **params)
    assert relative_error(found, full.delta) < 1e-4
    record = report.tensors[f"{LAYER}.weight"]
    assert {key: record[key] for key in from_factors.stats} == from_factors.stats
    assert record["energies"] == pytest.approx(trained.deltas().square().sum((1, 2)).tolist(), rel=1e-6)


@over_rules
def test_adapters_of_different_layers_are_merged(rule: str, params: dict[str, Any], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    W0 = {name: torch.randn(OUT, IN, generator=generator) for name in ("first.weight", "second.weight")}
    base = write_checkpoint(tmp_path / "base", W0)
    pairs = [(torch.randn(2, IN, generator=generator), torch.randn(OUT, 2, generator=generator)) for _ in range(2)]
    adapters = [write_adapter(tmp_path / n, {n: pair}) for n, pair in zip(("first", "second"), pairs, strict=True)]
    acemerge.merge(base, adapters, rule, tmp_path / "out", **params)
    merged = load_folder(tmp_path / "out")
    for i, (name, (A, B)) in enumerate(zip(W0, pairs, strict=True)):
        deltas = torch.zeros(2, OUT, IN, dtype=torch.float64)
        deltas[i] = B.double() @ A.double()
        full = acemerge.merge_deltas(deltas, rule, base=W0[name], **params)
        assert relative_error(merged[name] - W0[name].double(), full.delta) < 1e-4


@pytest.mark.parametrize("rule", ["tsv_m", "iso_c", "core_space"])
def test_their_rounding_is_no_update(rule: str, trained: Trained, tmp_path: Path) -> None:
    """Of an update a thousandth of the weights, where full float32 task vectors have a rank that is not theirs."""
    small = [(1e-3 * A, B) for A, B in trained.factors]
    adapters = [write_adapter(tmp_path / f"s{t}", {LAYER: pair}) for t, pair in enumerate(small)]
    report = acemerge.merge(trained.base, adapters, rule)
    assert report.tensors[f"{LAYER}.weight"]["rank"] == sum(RANKS)


@pytest.mark.parametrize("rule", ["ace", "tsv_m", "average", "kron_auto"])
@pytest.mark.parametrize(("family", "split"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_every_layer_of_a_model_whichever_way_it_is_stored(rule: str, family: str, split: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(family).save_pretrained(base)
    tensors = open_checkpoint(base).tensors
    turned = family == "gpt2"
    modules = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"] if turned else ["model.layers.0.mlp.up_proj"]
    generator = torch.Generator().manual_seed(3)
    factors: list[dict[str, tuple[Tensor, Tensor]]] = [{}, {}]
    for module in modules:
        rows, columns = tensors[f"{module}.weight"].shape[:: -1 if turned else 1]
        for own in factors[: 1 if module == modules[-1] and turned else 2]:  # the last one by the first adapter alone
            own[module] = (torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator))
    adapters = [write_adapter(tmp_path / f"a{i}", own) for i, own in enumerate(factors)]
    options = {"split_qkv": split, "compute_dtype": "float64"}
    report = acemerge.merge(base, adapters, rule, tmp_path / "out", **options)
    found, before = load_folder(tmp_path / "out"), load_folder(base)
    for module in modules:
        W0, name = before[f"{module}.weight"].double(), f"{module}.weight"
        products = [own[module][1].double() @ own[module][0].double() if module in own else None for own in factors]
        D = torch.stack([torch.zeros_like(W0.T if turned else W0) if P is None else P for P in products])
        rows = len(D[0]) // 3 if split and module.endswith("c_attn") else len(D[0])
        parts = list(zip(D.split(rows, 1), (W0.T if turned else W0).split(rows), strict=True))
        delta = torch.cat([acemerge.merge_deltas(part, rule, base=own).delta for part, own in parts])
        torch.testing.assert_close(found[name].double(), W0 + (delta.T if turned else delta), rtol=0, atol=1e-5)
        assert ("projections" in report.tensors[name]) == (len(parts) > 1 and rule != "average")


# --- what is not formed --------------------------------------------------------------------------------------


class Large(TorchDispatchMode):
    """Counts the results of torch's operations that have as many entries as the layer; views, of what was `given` too,
    are left out.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._seen = {value.untyped_storage().data_ptr() for value in given}

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= OUT * IN * value.itemsize:
                self.count += value.untyped_storage().data_ptr() not in self._seen
                self._seen.add(value.untyped_storage().data_ptr())
        return result


class Held:
    """The values of a piece, read beforehand."""

    def __init__(self, trained: Trained) -> None:
        models = [open_expert(path) for path in (trained.base, *trained.adapters)]
        self.values = {(i, name): model.read(name) for i, model in enumerate(models) for name in model.places}

    def take(self, wanted: tuple[int, str]) -> Tensor:
        return self.values[wanted]

    def release(self, model: int) -> None:
        pass


def large_tensors(trained: Trained, rule: str, **params: Any) -> int:
    """How many tensors of the layer's size a merge of it makes."""
    plan, held = trained.plan(rule, **params), Held(trained)
    setting, place = Setting(plan.recipe, plan.experts), Place(torch.device("cpu"))
    with Large(held.values.values()) as large:
        compute(Piece(plan.jobs[0]), held, setting, place)
    return large.count


@over_rules
def test_no_task_vector_is_formed(rule: str, params: dict[str, Any], trained: Trained) -> None:
    """But the base in the compute type, which takes the update, and the output's own memory."""
    assert large_tensors(trained, rule, **params) <= 2


def test_where_they_are_formed_they_are_counted(trained: Trained) -> None:
    assert large_tensors(trained, "dare_linear") > 2


@over_rules
def test_the_plan_knows_that_they_are_cheaper(rule: str, params: dict[str, Any], trained: Trained) -> None:
    plan = trained.plan(rule, **params)
    (job,) = plan.jobs
    assert job.keeps_low_rank
    full = open_recipe(
        make_recipe(
            {"base": str(trained.base), "experts": [str(trained.base)] * 3, "method": {"name": rule, **params}}
        ),
        None,
        RunOptions(),
    ).plan
    assert operations(plan) < operations(full) or rule in ("average", "task_arithmetic")
    assert cost(Piece(job), 3).working < cost(Piece(full.jobs[0]), 3).working


def test_what_must_see_task_vectors_or_weights_does(trained: Trained, tmp_path: Path) -> None:
    full = write_checkpoint(tmp_path / "full", {f"{LAYER}.weight": trained.W0 + 0.1})
    assert not trained.plan("ace", [*trained.adapters, full]).jobs[0].factored
    assert not trained.plan("ties").jobs[0].factored
    assert not Trained(tmp_path / "wide", ranks=(40, 40, 40)).plan("tsv_m").jobs[0].factored


# --- experts that share A ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ace", "actmat", "tact"])
def test_where_experts_share_their_inputs_the_outputs_are_used(rule: str, tmp_path: Path) -> None:
    trained = Trained(tmp_path, ranks=(3, 3, 3), frozen=True)
    report = acemerge.merge(trained.base, trained.adapters, rule, tmp_path / "out")
    found = load_folder(tmp_path / "out")[f"{LAYER}.weight"] - trained.W0.double()
    turned = acemerge.merge_deltas(trained.deltas().mT.contiguous(), rule).delta.T
    assert relative_error(found, turned) < 1e-4
    record = report.tensors[f"{LAYER}.weight"]
    assert (record["shared_input_side"], record["side"]) == (True, "output")
    warning = report.manifest["warnings"][0]  # how far the merge goes may be another
    assert f"share A in all 1 layers that {rule} merges" in warning
    assert "the output side is used" in warning


def test_of_inputs_that_are_not_shared_nothing_is_said(trained: Trained, tmp_path: Path) -> None:
    report = acemerge.merge(trained.base, trained.adapters, "ace")
    assert report.tensors[f"{LAYER}.weight"]["side"] == "input"
    assert report.manifest["warnings"] == []
    frozen = Trained(tmp_path / "frozen", ranks=(3, 3, 3), frozen=True)
    assert acemerge.merge(frozen.base, frozen.adapters, "tsv_m").manifest["warnings"] == []
