"""What was probably not meant is one line, in the plan and in the manifest; the merge goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import PlainModel, make_model, perturb

import acemerge
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import make_recipe


def planned(base: Path, experts: list[Path], **keys: Any) -> list[str]:
    recipe = make_recipe({"base": str(base), "experts": [str(path) for path in experts], **keys})
    return list(open_recipe(recipe, None, RunOptions()).plan.warnings)


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("*.upp.*", "rule '*.upp.*' matches no tensor; the nearest: layers.0.up."),
        ("layers.0.dwon.weight", "rule 'layers.0.dwon.weight' matches no tensor; the nearest: layers.0.down.weight"),
        ("*.embed_token.weight", "rule '*.embed_token.weight' matches no tensor; the nearest: embed_tokens.weight"),
        ("*qqq*", "rule '*qqq*' matches no tensor; see `acemerge plan`"),
    ],
)
def test_a_rule_that_matches_nothing_comes_with_the_nearest_names(plain: PlainModel, match: str, said: str) -> None:
    base, experts = plain.save()
    rules = [{"match": "*.down.*", "action": "base"}, {"match": match, "method": "average"}]
    (warning,) = planned(base, experts, rules=rules)
    assert warning.startswith(said)
    assert acemerge.merge(base, experts, rules=rules).manifest["warnings"] == [warning]
    _, report = acemerge.merge_state_dicts(plain.base, plain.tuned, rules=rules, report=True)
    assert report.manifest["warnings"] == [warning]


def test_one_expert_and_one_twice(plain: PlainModel) -> None:
    base, (first, second, _) = plain.save()
    assert planned(base, [first, second]) == []
    (alone,) = planned(base, [first])
    assert alone.startswith("there is one expert only")
    assert planned(base, [first], method="slerp") == []
    assert planned(base, [first], as_lora=2) == []
    again = first.parent / "again"
    again.symlink_to(first)
    for other in (first, first / ".." / first.name, again):
        (twice,) = planned(base, [first, second, other])
        assert twice.endswith("are one model, which counts twice; leave one out")


def test_an_expert_that_is_the_base_is_known_at_the_end(plain: PlainModel) -> None:
    plain.tuned[1] = dict(plain.base)
    base, experts = plain.save()
    assert planned(base, experts) == []
    (warning,) = acemerge.merge(base, experts, "average", plain.root / "out").manifest["warnings"]
    assert warning.startswith("expert e2 is frozen: it is the base itself; leave it out")
    assert acemerge.merge(base, experts, "average").manifest["warnings"] == [warning]
    assert acemerge.merge(base, experts, "average", rules=[{"match": "*", "action": "base"}]).manifest["warnings"] == []


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_head_by_a_rule_for_layers(tmp_path: Path, tied: bool) -> None:
    folders = [tmp_path / f"m{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        perturb(make_model("llama", tie_word_embeddings=tied), i).save_pretrained(folder)
    (warning,) = planned(folders[0], folders[1:], method="tsv_m", embeddings="rule")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert warning.startswith(f"{head} is an output head, by tsv_m: where measured it was up to 7 points worse")
    for keys in ({"method": "tsv_m"}, {"method": "ties", "embeddings": "rule"}):
        assert planned(folders[0], folders[1:], **keys) == []
