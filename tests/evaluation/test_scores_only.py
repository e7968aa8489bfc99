"""`compare --scores-only`: the scores of merges that are kept, and nothing else left, wherever these were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import failed, run
from safetensors.torch import load_file
from task_builders import save_family, sentences, write_tasks, write_tsv

import acemerge
from acemerge.checkpoints import files, machine
from acemerge.checkpoints.unfinished import MANIFEST
from acemerge.cli.interrupts import TERMINATED
from acemerge.engine.opening import open_recipes
from acemerge.engine.run_options import RunOptions
from acemerge.errors import NumericalError
from acemerge.evaluation import unkept
from acemerge.evaluation.compare import by_methods
from acemerge.recipes.recipe import make_recipe

RULES = ["average", "ties", "dare_ties"]
PLENTY = 1 << 40


class Case:
    """A base, experts in three and two classes with a task each, and a folder that stands for memory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = save_family(root, {"topic": 3, "tone": 2}, base_rows=5), monkeypatch
        self.memory, self.out = root / "memory", root / "made/out"
        self.memory.mkdir()
        monkeypatch.setattr(machine, "folder_in_memory", lambda: self.memory)
        self.there_are(memory=PLENTY, in_folder=PLENTY)
        tasks = []
        for name, rows in (("topic", 3), ("tone", 2)):
            write_tsv(root / f"{name}.tsv", {"s": sentences(41, rows), "y": [i % rows for i in range(41)]})
            tasks.append({"name": name, "kind": "classification", "data": f"{name}.tsv", "text": "s", "label": "y"})
        self.recipe = {"base": str(root / "base"), "experts": [str(root / "topic"), str(root / "tone")]}
        (root / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        self.tasks = write_tasks(root, *tasks, resamples=100)

    def there_are(self, memory: int, in_folder: int) -> None:
        """So many bytes of memory, and so many that its folder takes."""
        self.patch.setattr(machine, "free_memory", lambda: memory)
        self.patch.setattr(files, "free_bytes", lambda _: in_folder)

    def words(self, *more: object, rules: list[str] = RULES) -> list[object]:
        return ["compare", self.root / "recipe.yaml", "--methods", ",".join(rules), "--tasks", self.tasks, *more]

    def merged(self) -> tuple[list[str], list[str]]:
        """The names of the merges that there are in memory, and beside the results."""
        memory, out = (sorted(f.parent.name for f in place.rglob(MANIFEST)) for place in (self.memory, self.out))
        return memory, out

    def nothing_is_left(self) -> bool:
        return not any(self.memory.iterdir()) and not self.out.parent.exists()


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def table(out: Path) -> dict[str, Any]:
    """The results but for seconds and where models lay."""
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    for row in found["rows"].values():
        for score in row["tasks"].values():
            del score["seconds"]
    return found


def test_scores_are_those_of_kept_merges_wherever_these_were(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, *case.words("-o", case.root / "kept", "--quiet"))
    assert found == (0, "", ""), found[2]
    kept = table(case.root / "kept")
    one = (case.root / "base/model.safetensors").stat().st_size
    score, seen = unkept.rows_of, list[tuple[list[str], list[str]]]()

    def watched(*asked: Any) -> Any:
        seen.append(case.merged())
        return score(*asked)

    case.patch.setattr(unkept, "rows_of", watched)
    every = sorted(RULES)
    for room, expected in (
        ({"memory": PLENTY, "in_folder": PLENTY}, [(every, [])]),
        ({"memory": PLENTY, "in_folder": 3 * one // 2}, [([rule], []) for rule in RULES]),
        ({"memory": 1 << 30, "in_folder": PLENTY}, [([], [rule]) for rule in RULES]),
    ):
        case.there_are(**room)
        seen.clear()
        assert run(capsys, *case.words("-o", case.out, "--scores-only", "--quiet")) == (0, "", "")
        assert seen == expected
        found = table(case.out)
        assert list(found["rows"]) == ["experts", "base", *RULES]
        assert found["rows"] == kept["rows"]
        assert found["models"] == {"base": case.recipe["base"]}
        assert {rule: recipe["method"]["name"] for rule, recipe in found["recipes"].items()} == {
            rule: rule for rule in RULES
        }
        assert {file.name for file in case.out.iterdir()} == {f"evaluation.{kind}" for kind in ("json", "md", "png")}
        shutil.rmtree(case.out.parent)
        assert case.nothing_is_left()
    assert "recipes" not in kept
    assert all((case.root / "kept/merged" / rule / MANIFEST).is_file() for rule in RULES)


def test_adapters_that_are_merged_are_scored_in_the_base(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.root / "recipe.yaml").write_text(yaml.safe_dump(case.recipe | {"as_lora": 2}))
    words = case.words("--quiet", rules=["average"])
    assert run(capsys, *words, "-o", case.root / "kept")[0] == 0
    assert run(capsys, *words, "-o", case.out, "--scores-only")[0] == 0
    assert table(case.out)["rows"] == table(case.root / "kept")["rows"]
    assert not any(case.memory.iterdir())


def _raising(failure: BaseException, after: Callable[..., object] = lambda *_, **__: None) -> Callable[..., None]:
    def raising(*given: Any, **named: Any) -> None:
        after(*given, **named)
        raise failure

    return raising


@pytest.mark.parametrize("in_folder", [PLENTY, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize(
    ("moment", "failure", "code"),
    [
        ("merging", KeyboardInterrupt(), 130),
        ("scoring", SystemExit(TERMINATED), 143),
        ("scoring", NumericalError("task topic", "is not finite", "look"), 4),
        ("removing", KeyboardInterrupt(), 130),
    ],
)
def test_nothing_is_left_of_what_does_not_end(
    case: Case, capsys: pytest.CaptureFixture[str], in_folder: int, moment: str, failure: BaseException, code: int
) -> None:
    case.there_are(memory=PLENTY, in_folder=in_folder)
    if moment == "merging":
        case.patch.setattr(files, "write_all", _raising(failure, after=files.write_all))
    elif moment == "scoring":
        case.patch.setattr(unkept, "rows_of", _raising(failure))
    else:
        remove, failures = shutil.rmtree, [failure]

        def interrupted(*given: Any, **named: Any) -> None:
            if failures:
                assert any(case.merged())
                raise failures.pop()
            remove(*given, **named)

        case.patch.setattr(shutil, "rmtree", interrupted)
    failed(run(capsys, *case.words("-o", case.out, "--scores-only", "--quiet")), code, ": ")
    assert case.nothing_is_left()


def test_wrong_words_and_places(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", case.root / "base", "--tasks", case.tasks, "--scores-only", "-o", case.out]
    failed(run(capsys, *words), 2, "no merges to do without")
    failed(run(capsys, *words, case.root / "recipe.yaml"), 2, "no merges to do without")
    place = case.root / "topic/scores"
    failed(run(capsys, *case.words("-o", place, "--scores-only")), 2, "inside or around the input")
    assert case.nothing_is_left()


def test_what_fits_in_memory(case: Case) -> None:
    """Outputs with their masks, beside a network in float32 or what merges, and a margin; else the disk."""
    recipe = make_recipe(case.recipe | {"calibration": str(case.tasks)}, "test")
    recipes = by_methods(recipe, ["average", "emr", "regmean"])
    opened = open_recipes([(one, case.out / name) for name, one in recipes.items()], RunOptions())
    network = sum(4 * tensor.numel() for tensor in load_file(case.root / "base/model.safetensors").values())
    written = 0
    for name in ("average", "emr"):
        acemerge.merge(recipe.base, case.recipe["experts"], name, case.root / name)
        stored = [load_file(file) for file in (case.root / name).rglob("*.safetensors")]
        written += sum(tensor.nbytes for tensors in stored for tensor in tensors.values())

    def fitting(memory: int, budget: int = 0, in_folder: int = PLENTY) -> int:
        case.there_are(memory, in_folder)
        return unkept._fitting([replace(one, budget=budget) for one in opened])

    gigabyte = 1 << 30
    assert fitting(network + gigabyte + written) == 2  # regmean wants data
    assert fitting(network + gigabyte + written - 1) == 1
    assert fitting(network + gigabyte) == 0
    assert fitting(3 * gigabyte + written, budget=2 * gigabyte) == 2
    assert fitting(3 * gigabyte + written - 1, budget=2 * gigabyte) == 1
    assert [fitting(100 * gigabyte, budget=n * gigabyte) for n in (89, 91)] == [2, 0]
    assert [fitting(PLENTY, in_folder=n) for n in (written, written - 1, 0)] == [2, 1, 0]
    case.patch.setattr(machine, "folder_in_memory", lambda: None)
    assert fitting(PLENTY) == 0
