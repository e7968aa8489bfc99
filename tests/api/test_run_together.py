"""Several rules in one pass over the files: each output has the bytes that its rule alone would have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, write_adapter, write_checkpoint

import acemerge
from acemerge.api import run_opened, run_together
from acemerge.checkpoints.reader import Reader
from acemerge.engine.opening import Opened, open_recipe, open_recipes
from acemerge.engine.pipeline import Pipeline
from acemerge.engine.run_options import RunOptions
from acemerge.errors import NumericalError
from acemerge.methods import LayerResult, LayerStats
from acemerge.methods.elementwise import TaskArithmetic
from acemerge.methods.spectral import IsoC
from acemerge.output.manifest import load_manifest
from acemerge.output.verify import verify
from acemerge.output.writer import TensorFiles
from acemerge.planning.costs import cost
from acemerge.planning.pieces import Piece, common_pieces
from acemerge.recipes.recipe import Recipe, make_recipe

# Entrywise, with thresholds, by chance, spectral, by least squares, on both sides; with masks and around another rule.
RULES = ("average", "ties", "dare_ties", "tsv_m", "dc_merge", "iso_c", "iso_cts", "ace", "kron_auto", "emr", "trust")
RESUMED = RunOptions(resume=True)


class Full:
    """A model of a few tensors, whose experts are whole. `wide` is too large to be worked on in a stack."""

    def __init__(self, folder: Path) -> None:
        plain, random = PlainModel(folder), torch.Generator().manual_seed(3)
        plain.base["wide.weight"] = W = torch.randn(300, 240, generator=random)
        for expert in plain.tuned:
            expert["wide.weight"] = W + 0.1 * torch.randn(300, 240, generator=random)
        self.base, self.experts = plain.save()


class Adapters:
    """Two adapters of one layer, beside a tensor that they leave alone."""

    def __init__(self, folder: Path) -> None:
        random = torch.Generator().manual_seed(3)
        tensors = {"up.weight": torch.randn(64, 48, generator=random), "norm.weight": torch.ones(48)}
        self.base = write_checkpoint(folder / "base", tensors)
        self.experts = []
        for name, rank in (("one", 3), ("two", 2)):
            A, B = torch.randn(rank, 48, generator=random), torch.randn(64, rank, generator=random)
            self.experts.append(write_adapter(folder / name, {"up": (A, B)}))


def recipes_for(models: Full | Adapters, rules: Sequence[str] = RULES) -> dict[str, Recipe]:
    content: dict[str, Any] = {"base": str(models.base), "experts": [str(expert) for expert in models.experts]}
    return {rule: make_recipe({**content, "method": rule}) for rule in rules}


def together(recipes: dict[str, Recipe], out: Path) -> None:
    runs = [(recipe, out / rule) for rule, recipe in recipes.items()]
    run_together(list(zip(open_recipes(runs, RESUMED), (folder for _, folder in runs), strict=True)), RESUMED)


def hashes(out: Path, rules: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of every weight file that the manifests list, which `verify` has seen to be there."""
    found = {rule: verify(out / rule)["outputs"] for rule in rules}
    return {
        rule: {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
        for rule, files in found.items()
    }


def alone(recipes: dict[str, Recipe], out: Path) -> dict[str, dict[str, str]]:
    for rule, recipe in recipes.items():
        run_opened(open_recipe(recipe, out / rule, RunOptions()), out / rule, RunOptions())
    return hashes(out, list(recipes))


@pytest.mark.parametrize("kind", [Full, Adapters])
@pytest.mark.usefixtures("two_threads")
def test_each_rule_writes_its_own_bytes(tmp_path: Path, kind: type[Full] | type[Adapters]) -> None:
    recipes = recipes_for(kind(tmp_path / "models"))
    expected = alone(recipes, tmp_path / "alone")
    together(recipes, tmp_path / "together")
    assert hashes(tmp_path / "together", RULES) == expected
    assert len({tuple(files.values()) for files in expected.values()}) > len(RULES) / 2  # the rules do differ
    for rule in RULES:
        one, other = (load_manifest(tmp_path / place / rule) for place in ("alone", "together"))
        assert [one[key] for key in ("inputs", "recipe", "run")] == [other[key] for key in ("inputs", "recipe", "run")]


@pytest.mark.parametrize("rules", [("tsv_m", "dc_merge", "trust"), ("iso_c", "iso_cts")])
def test_what_rules_have_in_common_is_decomposed_once(
    tmp_path: Path, rules: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task vectors of three experts, or their sum."""
    recipes, real, counted = recipes_for(Full(tmp_path / "models"), rules), torch.linalg.eigh, []

    def counting(A: torch.Tensor) -> Any:
        counted.append(A.shape)
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    alone(recipes, tmp_path / "alone")
    each = counted.count((240, 240))
    counted.clear()
    together(recipes, tmp_path / "together")
    assert each - counted.count((240, 240)) == (1 if rules[0] == "iso_c" else 3 * (len(rules) - 1))


def test_a_rule_that_gives_a_task_vector_away_spoils_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is added to what it gives in place."""
    monkeypatch.setattr(TaskArithmetic, "merge", lambda _, deltas, layer: LayerResult(deltas[0], LayerStats()))
    recipes = recipes_for(Full(tmp_path / "models"), ("task_arithmetic", "iso_c"))
    expected = alone(recipes, tmp_path / "alone")
    together(recipes, tmp_path / "together")
    assert hashes(tmp_path / "together", list(recipes)) == expected


def test_the_files_are_read_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = ("average", "iso_c", "ace")  # without thresholds, which take passes of their own
    recipes = recipes_for(Full(tmp_path / "models"), rules)
    runs = [(recipe, tmp_path / rule) for rule, recipe in recipes.items()]
    opened = open_recipes(runs, RESUMED)
    reads: list[tuple[str, int]] = []
    real = Reader.read

    def reading(self: Reader, places: Any, buffer: Any) -> Any:
        reads.extend((str(self.checkpoint.path), place.offset) for place in places.found if self.hashing)
        return real(self, places, buffer)

    monkeypatch.setattr(Reader, "read", reading)
    run_together(list(zip(opened, (folder for _, folder in runs), strict=True)), RESUMED)
    assert len(reads) == len(set(reads)) == len(opened[0].checkpoints) * len(opened[0].plan.jobs)


def test_an_interrupted_pass_goes_on_where_each_output_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, out = recipes_for(Full(tmp_path / "models")), tmp_path / "together"
    real, done = TensorFiles.end_of_tensor, 0

    def end_of_tensor(self: TensorFiles, names: Any) -> Any:
        nonlocal done
        done += 1
        if done > 2 * len(RULES) + 3:  # some outputs have a tensor more than the others
            raise KeyboardInterrupt
        return real(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(acemerge.engine.pipeline, "_BATCH_PIECES", 1)
        patch.setattr(TensorFiles, "end_of_tensor", end_of_tensor)
        with pytest.raises(KeyboardInterrupt):
            together(recipes, out)
    assert not list(out.glob("*/acemerge.json"))
    together(recipes, out)
    assert hashes(out, RULES) == alone(recipes, tmp_path / "alone")


def test_a_rule_that_fails_leaves_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = recipes_for(Full(tmp_path / "models"), ("average", "iso_c", "ace"))

    def merge(*_: Any) -> Any:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(IsoC, "merge", merge)
    with pytest.raises(NumericalError, match="no convergence"):
        together(recipes, tmp_path)
    assert verify(tmp_path / "average")
    assert not (tmp_path / "iso_c/acemerge.json").exists()
    assert not (tmp_path / "ace/acemerge.json").exists()


def test_what_is_finished_is_not_merged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = recipes_for(Full(tmp_path / "models"), ("average", "iso_c"))
    together(recipes, tmp_path)
    monkeypatch.setattr(Pipeline, "stream", None)
    together(recipes, tmp_path)


def test_a_common_piece_costs_what_all_of_its_jobs_hold(tmp_path: Path) -> None:
    """The inputs stay for the last of them, and what each has made waits to be written."""
    recipes = recipes_for(Full(tmp_path), ("average", "iso_c", "ace"))
    opened: list[Opened] = open_recipes([(recipe, None) for recipe in recipes.values()], RunOptions())
    name = "wide.weight"
    jobs = [next(job for job in one.plan.jobs if job.name == name) for one in opened]
    (piece,) = common_pieces(jobs)
    each, whole = [cost(Piece(job), 3) for job in jobs], cost(piece, 3)
    assert [own.job for own in piece.each] == jobs
    assert whole.written == sum(c.written for c in each)
    spectra = 8 * (4 * 240**2 + 300 * 240)  # of three task vectors and their sum, and the sum itself
    assert whole.working == piece.bytes_in + max(c.working for c in each) + spectra + whole.written
