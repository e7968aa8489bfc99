"""Layers on one line: in `plan`, and in what `extract-lora` says."""

from __future__ import annotations

import io
import re

import pytest
import torch
from builders import PlainModel
from commands import failed, run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from acemerge.cli.grouping import grouped, natural, shortened
from acemerge.cli.plan import show
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import make_recipe

NAMES = [f"model.layers.{i}.{part}.weight" for i in (10, 2, 0, 1) for part in ("up", "down")] + ["lm_head.weight"]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["a.0.w", "a.2.w", "a.1.w"], ["a.0-2.w"]),
        (["a.0.w", "a.2.w", "a.5.w"], ["a.0,2,5.w"]),
        ([f"a.{i}.w" for i in range(0, 20, 2)], ["a.0..18.w"]),
        ([f"h.{i}.experts.{j}.w" for i in range(3) for j in range(8)], ["h.0-2.experts.0-7.w"]),
        (["h.3.ff.1.w", "h.4.ff.1.w"], ["h.3-4.ff.1.w"]),
        (["0.w", "1.w", "w2.a"], ["0-1.w", "w2.a"]),
        (["x.w"], ["x.w"]),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: list[str], common: list[str]) -> None:
    assert [name for name, _ in grouped(names, lambda _: None)] == common


def test_layers_come_in_their_order_and_unlike_ones_apart() -> None:
    assert [name for name, _ in grouped(NAMES, len, every=True)][1:5] == [
        "model.layers.0.down.weight", "model.layers.0.up.weight",
        "model.layers.1.down.weight", "model.layers.1.up.weight",
    ]  # fmt: skip
    assert max(NAMES, key=natural) == "model.layers.10.up.weight"
    kinds = grouped(NAMES[:8], lambda name: ".0." in name)
    assert [name for name, _ in kinds][2:] == ["model.layers.1,2,10.down.weight", "model.layers.1,2,10.up.weight"]


parts = st.lists(st.sampled_from(["a", "b", "0", "1", "12", "w1"]), min_size=1, max_size=4)


@given(st.lists(parts.map(".".join), unique=True), st.booleans())
def test_every_name_is_in_one_group(names: list[str], every: bool) -> None:
    found = grouped(names, len, every)
    assert sorted(name for _, members in found for name in members) == sorted(names)
    assert len({common for common, _ in found}) <= len(found)
    assert all(common == members[0] for common, members in found if len(members) == 1)


@given(st.text(min_size=1), st.integers(min_value=2, max_value=30))
def test_a_long_name_keeps_its_end(name: str, width: int) -> None:
    short = shortened(name, width)
    assert len(short) <= width
    assert name.endswith(short.removeprefix("…")) or short == name


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("width", [60, 80])
def test_a_plan_fits_the_terminal(plain: PlainModel, width: int, every: bool) -> None:
    for model in (plain.base, *plain.tuned):
        for i in range(11):
            model[f"transformer.{'a_long_name_of_a_module.' * 3}h.{i}.mlp.up.weight"] = torch.randn(8, 6)
    base, experts = plain.save()
    recipe = make_recipe({"base": str(base), "experts": [str(path) for path in experts]})
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(console, open_recipe(recipe, None, RunOptions(force=True)).plan, every)
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if len(line) > width] == []
    assert sum("mlp.up.weight" in line for line in lines) == (11 if every else 1)
    numbers = re.findall(r"\.([\d-]+)\.mlp\.up", "\n".join(lines))
    assert numbers == (list(map(str, range(11))) if every else ["0-10"])
    assert "…" in "".join(lines)


def test_what_is_lost_is_said_by_groups(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (plain.base, *plain.tuned):
        model["layers.1.up.weight"] = torch.randn(8, 6)
    base, (first, *_) = plain.save()
    words = ["extract-lora", first, "--base", base, "--rank", 2, "--overwrite", "-o", plain.root / "out"]
    code, printed, _ = run(capsys, *words)
    assert code == 0
    assert re.search(r"^ +2 +[\d.]+ +[\d.]+%  layers\.0-1\.up\.weight$", printed, re.MULTILINE)
    every = run(capsys, *words, "--all")[1]
    assert re.search(r"^ +1 +[\d.]+ +[\d.]+%  layers\.1\.up\.weight$", every, re.MULTILINE)
    total = [
        sum(float(row.split()[1]) for row in text.splitlines() if row.endswith("weight")) for text in (printed, every)
    ]
    assert total[0] == pytest.approx(total[1], rel=1e-3)


def test_an_output_that_is_there_is_refused_before_anything_is_said(
    plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = plain.save()
    words = ["--base", base, "--expert", experts[0], "-o", plain.root / "out"]
    assert run(capsys, "merge", *words, "--quiet")[0] == 0
    for command in ("plan", "merge"):
        failed(run(capsys, command, *words), 2, "holds a finished merge; choose another folder or add --overwrite")
    assert run(capsys, "plan", *words, "--overwrite")[0] == 0
    (plain.root / "file").write_text("")
    failed(run(capsys, "plan", *words[:-1], plain.root / "file"), 2, "is a file; name a folder")
    failed(run(capsys, "convert", base, plain.root / "out"), 2, "holds a finished merge")
