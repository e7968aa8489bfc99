"""What is behind the page of `acemerge ui`: folders, choices, and what is shown."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from builders import write_adapter, write_checkpoint
from commands import failed, run
from hostile import MARKUP as HOSTILE
from hostile import TERMINAL
from ui_choices import picked

from acemerge.engine.execute import Progress
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.inspection.survey import survey
from acemerge.methods import METHODS
from acemerge.methods.about import parameters, summary
from acemerge.methods.registry import rule_name
from acemerge.recipes.recipe import load_recipe, make_recipe
from acemerge.ui import steps, view
from acemerge.ui.choice import Choice, rules
from acemerge.ui.folders import Folders, Listing
from acemerge.ui.runner import Runner, State, line

# --- folders -------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_at_any_depth_by_the_names_of_recipes(shelf: Folders) -> None:
    weights = {"w": torch.ones(4, 4)}
    write_checkpoint(Path("models/deep/er"), weights, {"model_type": "gpt2"})
    write_adapter(Path("models/lora"), {"layers.0.up": (torch.ones(1, 6), torch.ones(8, 1))})
    write_checkpoint(Path("models/.cache/hidden"), weights)
    Path("models/empty").mkdir()
    listing = shelf.find()
    kinds = {found.name: found.kind for found in listing.found}
    plain = {f"./models/{name}": "" for name in ("base", "e1", "e2", "e3")}
    assert kinds == plain | {"./models/deep/er": "gpt2", "./models/lora": "LoRA"}
    sizes = {found.name: found.nbytes for found in listing.found}
    assert sizes["./models/deep/er"] == Path("models/deep/er/model.safetensors").stat().st_size
    assert listing.passed_over == ()
    assert [found.name for found in Folders([Path()]).find().found if "out" in found.name] == ["./outside"]


def test_what_leads_outside_is_neither_listed_nor_opened(shelf: Folders) -> None:
    Path("models/link").symlink_to(Path("outside").resolve())
    Path("models/within").symlink_to(Path("models/e1").resolve())
    Path("models/half").mkdir()
    Path("models/half/model.safetensors").symlink_to(Path("outside/model.safetensors").resolve())
    listing = shelf.find()
    assert {found.name for found in listing.found} == {f"./models/{name}" for name in ("base", "e1", "e2", "e3")}
    assert len(listing.passed_over) == 2
    assert all("outside" in line for line in listing.passed_over)
    for name in ("./outside", "models/../outside", "./models/link", "/etc", "../..", "models/link/new"):
        with pytest.raises(UsageError, match="outside the folders named at start"):
            shelf.inside(name)
    with pytest.raises(CheckpointError):
        shelf.inside("models/\0")
    assert shelf.inside(" ./models/within ") == Path("models/e1").resolve()
    assert shelf.inside("models/new/one") == Path("models").resolve() / "new/one"


def test_weights_behind_a_link_of_a_cache_are_refused_where_the_cache_was_not_named(shelf: Folders) -> None:
    """Of a snapshot that was named alone, the blobs lie outside."""
    snapshot = Path("models--org--m/snapshots/abc")
    blobs = Path("models--org--m/blobs")
    blobs.mkdir(parents=True)
    shutil.copytree("models/base", snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    choice = Choice(str(snapshot), ["./models/e1"])
    with pytest.raises(UsageError, match="blobs/123: lies outside"):
        steps.open_choice(choice, Folders([snapshot, Path("models")]))
    assert steps.open_choice(choice, Folders([Path()])).plan.jobs
    assert "lies outside" in Folders([snapshot]).find().passed_over[0]


def test_a_folder_that_is_not_there_is_an_error_and_one_that_is_named_twice_is_looked_at_once(shelf: Folders) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Folders([Path("models"), Path("nowhere")])
    assert Folders([Path("models"), Path("models")]).find() == shelf.find()
    assert len(Folders([Path(), Path("models")]).find().found) == 5


def test_a_folder_whose_name_is_no_text_is_passed_over(shelf: Folders) -> None:
    os.rename("models/e1", "models/\udcff")
    assert [found.name for found in shelf.find().found] == ["./models/base", "./models/e2", "./models/e3"]
    (line,) = shelf.find().passed_over
    assert line.endswith("models/\\udcff: its name is no text in UTF-8; rename the folder")


def test_a_damaged_checkpoint_is_passed_over_with_a_reason(shelf: Folders) -> None:
    Path("models/e1/config.json").write_text("[]")
    listing = shelf.find()
    assert len(listing.found) == 3
    assert listing.passed_over[0].startswith(str(Path("models/e1/config.json").resolve()))


def test_the_command_says_what_is_missing(
    shelf: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(run(capsys, "ui", "models", "nowhere"), 3, "nowhere: no such folder; name folders")
    monkeypatch.setitem(sys.modules, "gradio", None)
    failed(run(capsys, "ui", "models"), 2, r"the page needs gradio, .*; pip install 'acemerge\[ui\]'")


# --- choices -------------------------------------------------------------------------------------------------


def test_the_recipe_on_the_page_is_the_recipe_that_is_run(shelf: Folders) -> None:
    choice = picked("e1", "e2", rule="ties", weights="1, 0.5", values={"keep": "0.30", "trim": "tensor", "scale": ""})
    text = choice.yaml(shelf)
    assert text == (
        "method:\n  name: ties\n  keep: 0.3\n  trim: tensor\nbase: ./models/base\n"
        "experts:\n- ./models/e1\n- model: ./models/e2\n  weight: 0.5\n"
    )
    Path("recipe.yaml").write_text(text)
    opened = [open_recipe(r, None, RunOptions()) for r in (load_recipe(Path("recipe.yaml"), {}), choice.recipe(shelf))]
    assert opened[0].plan.jobs == opened[1].plan.jobs


@pytest.mark.parametrize("rule", rules())
def test_every_rule_takes_its_own_defaults_as_they_are_shown(rule: str, shelf: Folders) -> None:
    """Typed into a field they are text, chosen from a menu they are values."""
    shown = {p.name: p.default if p.choices or p.default is None else str(p.default) for p in parameters(METHODS[rule])}
    assert picked("e1", rule=rule, values=shown).content(shelf)["method"] == {"name": rule}


def test_rules_are_offered_by_family_and_those_with_data_are_not() -> None:
    offered = rules()
    families = [shown.partition(" · ")[0] for shown in offered.values()]
    assert len(set(families)) == sum(a != b for a, b in zip(["", *families], families, strict=False))
    assert not {"regmean", "fisher", "mergekit_sum"} & offered.keys()
    assert {"ace", "ties", "slerp"} <= offered.keys()
    assert [name for name, shown in offered.items() if "recommended" in shown] == [rule_name("auto")]


def test_the_recommended_rule_is_what_is_taken_where_none_is_picked(shelf: Folders) -> None:
    assert picked("e1").content(shelf)["method"] == {"name": rule_name("auto")}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("out: holds a merge; choose another folder or add --overwrite", f"or tick “{view.REPLACE}”"),
        ("e1: is a stranger; or merge all the same with --force", f"with “{view.FORCE}” ticked"),
        (
            "`lm_head` differs; match rows with --vocabulary union",
            ">lm_head differs; match rows with vocabulary union (on the command line)<",
        ),
        (
            "it overshoots; --scale 0.7, or --method auto is nearer",
            "; a scale of 0.7, or the recommended rule is nearer<",
        ),
        ("they move far; with other rules, as --method ties, a smaller --scale", "as the rule ties, a smaller scale<"),
        (
            "e1: lacks 'w'; add the recipe rule {match: w, action: heads}: the base's stays",
            "action: heads}: the base&#x27;s stays (in a recipe file, on the command line)<",
        ),
        (
            "e1 has a template; `assets: e1` takes all of its files",
            "assets: e1 takes all of its files (in a recipe file, on the command line)<",
        ),
        (
            "it overshoots; a larger eps, as --set eps=1e-2, --scale 0.22, or another",
            "as eps = 1e-2, a scale of 0.22, or another<",
        ),
    ],
)
def test_advice_on_the_page_is_about_the_page(line: str, shown: str) -> None:
    assert shown in view.failure(line)


def test_what_a_rule_says_of_itself() -> None:
    found = {p.name: p for p in parameters(METHODS["ace"])}
    assert list(found) == ["eps", "tau", "k_frac", "ablation", "scale"]
    assert found["eps"].default == 1e-5
    assert found["eps"].meaning == "ridge on every second moment"
    assert all(p.meaning for name in rules() for p in parameters(METHODS[name]))
    assert found["ablation"].choices == ("E1", "E2", "E3", "E4")
    assert {p.name: p.choices for p in parameters(METHODS["mergekit_sum"])}["vote"] == (False, True)
    assert summary(METHODS["ace"]).startswith("ACE-Merging, exactly as published")
    assert "\n" not in summary(METHODS["ace"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(None, ["./models/e1"]), "base: none is picked; pick"),
        (picked(), "experts: none is picked; pick"),
        (picked("e1", weights="one"), "weights: 'one' are no numbers; write"),
        (picked("e1", weights="1 2"), "weights: 2 weights for 1 experts; give one for each"),
        (picked("e1", weights="nan"), "page: 'experts.0.ExpertSpec.weight'|page: 'experts.0.weight'"),
        (picked("e1", rule="ace", values={"eps": "much"}), "method 'ace', parameter 'eps': .* not 'much'; see"),
        (picked("e1", rule="nothing"), "method 'nothing': no such rule; "),
        (Choice("./outside", ["./models/e1"]), "./outside: lies outside the folders named at start; use one inside"),
        (picked("../outside"), "./models/../outside: lies outside"),
    ],
)
def test_a_wrong_choice_is_one_line(choice: Choice, message: str, shelf: Folders) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        choice.recipe(shelf)
    assert "\n" not in line(failure.value)


# --- what is shown -------------------------------------------------------------------------------------------


def test_what_is_shown_of_an_inspection_and_a_plan_is_what_was_found(shelf: Folders) -> None:
    opened = steps.open_choice(picked("e1", "e2", "e3", rule="ace"), shelf)
    seen = survey(opened, 1)
    html = view.inspection(seen)
    for expert in seen.table()["experts"]:
        assert f"{expert['share']:.1%}</td>" in html
        assert f"{expert['cosines']['e3']:.2f}</td>" in html
    for advice in seen.advice:
        assert f"<strong>{advice.what}</strong>" in html.replace("&#x27;", "'")
    assert "layers.0.down.weight" in view.plan(opened.plan)
    assert "<td>ace</td>" in view.plan(opened.plan)
    assert "No warnings" in view.inspection(survey(steps.open_choice(picked("e2", "e3"), shelf), 1))


def test_names_from_files_are_text(tmp_path: Path) -> None:
    tensors = {f"layers.0.{HOSTILE}.weight": torch.eye(3)}
    base = write_checkpoint(tmp_path / "base", tensors)
    experts = [write_checkpoint(tmp_path / f"e{c}", {n: v * c for n, v in tensors.items()}) for c in (-1, 3)]
    content = {"method": "average", "base": str(base), "experts": [str(path) for path in experts]}
    opened = open_recipe(make_recipe(content), None, RunOptions())
    progress = Progress("merge", HOSTILE, 1, 2, 3, 4)
    shown: list[str] = [
        view.plan(opened.plan),
        view.inspection(survey(opened, 1)),
        view.state(State(1, "merge", "running", progress, 1.0)),
        view.state(State(1, "merge", "failed", error=HOSTILE + TERMINAL)),
        view.listing(Listing((), (f"{HOSTILE}\udcff",))),
        view.about(HOSTILE, HOSTILE),
        view.roots([Path(HOSTILE)]),
    ]
    for html in shown:
        assert "&lt;img src=x" in html
        assert "<img" not in html
        assert html.isprintable()


def test_an_error_whose_cause_was_mended_is_not_drawn_again(shelf: Folders) -> None:
    gr = pytest.importorskip("gradio")
    from acemerge.ui.page import _Slots, _Work

    runner = Runner()
    with gr.Blocks():
        work = _Work(shelf, runner, _Slots("average"))
    entered = ["../outside", False, False, "base", ["e1"], "", "average"]
    work.merge(*entered)
    assert "outside" in work.show(*entered)[3]
    assert work.show("models/out", *entered[1:])[3] == ""
