"""The report page: its figures, what it does without the models, and names that would be code if they could."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from builders import PlainModel, load_folder, write_checkpoint
from commands import failed, run
from hostile import TENSOR as HOSTILE
from report_pages import Page, many
from torch.nn.functional import cosine_similarity as cosine

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.inspection.look_back import BEFORE, LookBack, look_back
from acemerge.methods.stats import LayerStats, of_slices
from acemerge.models.depth import layer_number
from acemerge.output.manifest import load_manifest
from acemerge.output.verify import verify
from acemerge.recipes.recipe import make_recipe
from acemerge.report.facts import page_facts
from acemerge.report.html import html_page
from acemerge.report.write import write_report


@pytest.fixture
def out(plain: PlainModel) -> Path:
    """A merge by ACE that refined: its layers are large enough, its experts differ in size."""
    base, experts = plain.save()
    acemerge.merge(base, experts, "ace", out=plain.root / "out", k_frac=0.5)
    return plain.root / "out"


# --- figures -------------------------------------------------------------------------------------------------


def test_the_look_back_sees_what_was_merged(plain: PlainModel, out: Path) -> None:
    seen, merged = look_back(out, load_manifest(out)), load_folder(out)
    assert seen.tensors.keys() == plain.base.keys() - {"position_ids"}
    for name, probe in seen.tensors.items():
        W0 = plain.base[name].double()
        D = torch.stack([expert[name].double() - W0 for expert in plain.tuned])
        M = merged[name].double() - W0
        torch.testing.assert_close(probe.agreement, cosine(D.flatten(1), M.flatten()[None]), rtol=0, atol=1e-6)
        torch.testing.assert_close(probe.sums.products, D.flatten(1) @ D.flatten(1).T, rtol=1e-5, atol=1e-6)
        if name not in ("layers.0.up.weight", "layers.0.down.weight"):
            assert not probe.spectra
            continue
        before = acemerge.merge_deltas(D, "ace", k_frac=0.5, ablation="E3").delta
        expected = {"e1": D[0], "e2": D[1], "e3": D[2], "merged": M, BEFORE: before}
        assert probe.spectra.keys() == expected.keys()
        for label, X in expected.items():
            torch.testing.assert_close(probe.spectra[label], torch.linalg.svdvals(X), rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_not_refined_has_no_spectrum_before_it(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, method="average", out=plain.root / "out")
    seen = look_back(plain.root / "out", load_manifest(plain.root / "out"))
    assert seen.tensors["layers.0.up.weight"].spectra.keys() == {"e1", "e2", "e3", "merged"}


def test_curves_keep_their_ends_and_leave_rounding_out() -> None:
    manifest, seen = many(4, 2)
    name = next(iter(seen.tensors))
    values = torch.tensor([100.0, 10, 1, 1e-3, 1e-12]).double()
    curves = {"expert-0": values, "expert-1": 0 * values}
    probe = replace(seen.tensors[name], spectra=curves, shape=(2000, 3000))
    drawn = page_facts(manifest, LookBack(seen.experts, {name: probe}), "").data["spectra"][name]
    curves, about = drawn["curves"], drawn["about"]
    assert about.startswith("the leading 5 of 2000 singular values; what is under 1e-7 of the largest is rounding")
    assert curves == {"expert-0": [[1, 2.0], [2, 1.0], [3, 0.0], [4, -3.0]], "expert-1": []}


def test_what_a_rule_says_of_slices_is_summed_up() -> None:
    stats = of_slices(
        [LayerStats(gamma=0.1, branch="homogeneous"), LayerStats(gamma=0.4, branch="heterogeneous"), LayerStats()]
    )
    assert stats.largest(lambda part: part.gamma) == 0.4
    assert stats.branches == "mixed"
    assert LayerStats(gamma=None).largest(lambda part: part.gamma) is None
    assert [layer_number(name) for name in ("h.3.attn.weight", "a.b.12.c", "7.x", "embed.weight")] == [3, 12, 7, None]


def test_shares_and_answers_follow_the_energies() -> None:
    manifest, seen = many(8, 2)
    for i, record in enumerate(manifest["tensors"].values()):
        record["energies"] = [9.0, 1.0] if i < 4 else [1.0, 1.0]
    facts = page_facts(manifest, seen, "")
    shares = {(row["layer"], row["expert"]): row["share"] for row in facts.data["shares"]}
    assert shares == {("0", "expert-0"): 0.9, ("0", "expert-1"): 0.1, ("1", "expert-0"): 0.5, ("1", "expert-1"): 0.5}
    answers = dict(facts.answers)
    assert answers["Which expert dominates?"].startswith("expert-0 has 83% of the energy")
    assert answers["What would I change?"].startswith("Give it a weight of 0.45")
    assert answers["Which layers are in conflict?"].startswith(
        "Most in model.layers.0.self_attn.q_proj.weight (50% cancels)"
    )


# --- the page ------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_asks_for_nothing(out: Path) -> None:
    page = Page(write_report(out).read_text())
    manifest = load_manifest(out)
    read = [about for entry in manifest["inputs"] for about in entry["files"].values()]
    assert all(sums["sha256"] in page.text for sums in manifest["outputs"].values())
    assert all(f"of each of {len(about['tensors'])} tensors" in page.text for about in read)
    assert all(name in page.text for name in manifest["tensors"])
    outside = [a for _, a in page.tags if "src" in a or str(a.get("href", "#"))[:1] != "#"]
    assert outside == []
    assert [tag for tag, _ in page.tags if tag == "link"] == []
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    labelled = {a["for"] for tag, a in page.tags if tag == "label"}
    assert {a["id"] for tag, a in page.tags if tag in ("select", "input")} == labelled
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert {row["a"] for row in json.loads(page.data)["cosines"]} == {"e1", "e2", "e3", "merged"}


@pytest.mark.parametrize(("method", "own"), [("ace", {"gamma", "branch", "condition"}), ("average", set())])
def test_figures_that_the_rule_does_not_give_have_no_column(plain: PlainModel, method: str, own: set[str]) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out", method=method)
    page = write_report(plain.root / "out").read_text()
    columns = set(re.findall(r'<button type="button">([^<]+)</button>', page))
    always = {"tensor", "role", "rule", "status", "energy", "cancels", "largest update", "its share", "seconds"}
    assert columns == always | own
    assert {a["value"] for tag, a in Page(page).tags if tag == "option" and "value" in a} == {
        "energy",
        "cancelled",
    } | own


def test_the_recipe_on_the_page_gives_the_same_merge_again(out: Path) -> None:
    recipe = re.search(r"<pre[^>]*>(.*?)</pre>", write_report(out).read_text(), re.DOTALL)
    assert recipe is not None
    assert make_recipe(yaml.safe_load(html.unescape(recipe[1]))) == make_recipe(load_manifest(out)["recipe"])


def test_every_figure_says_what_to_do_with_it(out: Path) -> None:
    tags = [(tag, a.get("class")) for tag, a in Page(write_report(out).read_text()).tags]
    assert tags.count(("p", "todo")) == tags.count(("figure", None)) == 5


def test_names_from_files_are_never_markup(plain: PlainModel) -> None:
    for model in (plain.base, *plain.tuned):
        model[HOSTILE] = model.pop("layers.0.up.weight")
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out", rules=[{"match": "</script><b>*", "action": "base"}])
    page = Page(write_report(plain.root / "out").read_text())
    assert HOSTILE in page.text
    assert HOSTILE in json.loads(page.data)["spectra"]
    assert not {tag for tag, _ in page.tags} & {"img", "b"}
    assert [a.get("id") for tag, a in page.tags if tag == "script"] == ["data", None, None]


def test_a_folder_whose_name_is_no_text_has_a_page(plain: PlainModel) -> None:
    base, experts = plain.save()
    expert = experts[0].rename(plain.root / "\udcff<b>")
    acemerge.merge(base, [expert], out=plain.root / "out", report=True)
    page = Page((plain.root / "out" / "report.html").read_text("utf-8"))
    assert "\\udcff<b>" in page.text
    assert not {tag for tag, _ in page.tags} & {"b"}


def test_a_thousand_tensors_of_eight_experts_stay_under_five_megabytes() -> None:
    page = html_page(page_facts(*many(1000, 8), ""))
    assert len(page.encode()) < 5_000_000
    assert len(json.loads(Page(page).data)["spectra"]) == 1000


def test_without_the_models_the_page_says_so(out: Path) -> None:
    shutil.rmtree(out.parent / "e2")
    page = Page(write_report(out).read_text())
    assert re.search(r"spectra are missing, .*/e2: is not there; run it where the merge was run", page.text)
    data = json.loads(page.data)
    assert data["cosines"] is None
    assert data["spectra"] == {}
    assert len(data["shares"]) == 6


def test_other_models_in_their_place_are_not_taken_for_them(plain: PlainModel, out: Path) -> None:
    write_checkpoint(out.parent / "e1", plain.tuned[0] | {"more": torch.ones(3)})
    with pytest.raises(UsageError, match=r"e1/model\.safetensors: is not what was merged"):
        look_back(out, load_manifest(out))


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_and_the_option_write_it(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    target = plain.root / "out"
    words = ["merge", "--base", base, "--expert", experts[0], "-o", target]
    assert run(capsys, *words, "--report")[0] == 0
    assert (target / "report.html").stat().st_size > 500_000
    verify(target)
    assert run(capsys, *words, "--overwrite")[0] == 0
    assert not (target / "report.html").exists()  # it told of another merge
    code, text, _ = run(capsys, "report", target, "-o", plain.root / "page.html")
    assert code == 0
    assert f"{plain.root / 'page.html'}: " in text
    assert {path.name for path in target.iterdir()} == {*load_manifest(target)["outputs"], "acemerge.json"}
    failed(run(capsys, "report", base), 3, "has no acemerge.json")
    failed(run(capsys, "report", plain.root / "nowhere"), 3, "no such folder")


def test_without_the_extra_the_error_names_it_before_any_work(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = plain.save()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"pip install 'acemerge\[report\]'"):
        acemerge.merge(base, experts, out=plain.root / "out", report=True)
    assert not (plain.root / "out").exists()


def test_what_is_no_merge_has_no_report(plain: PlainModel, out: Path) -> None:
    (out / "acemerge.json").unlink()
    with pytest.raises(CheckpointError, match="continue one that did not finish"):
        write_report(out)
