"""Cures are followed to the letter: each leads to an output, and throws no expert's values away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import PlainModel, load_folder, write_checkpoint
from safetensors.torch import load_file

import acemerge
from acemerge.errors import CheckpointError

UP = "layers.0.up.weight"


def _cure(plain: PlainModel) -> tuple[str, str]:
    """What is refused of the models as they are, and what is advised."""
    base, experts = plain.save()
    with pytest.raises(CheckpointError) as failure:
        acemerge.merge(base, experts, "average")
    return failure.value.what, failure.value.cure


def _followed(plain: PlainModel, cure: str) -> Path:
    """The output with the recipe's rule that a cure advises."""
    base, experts = plain.save()
    found = re.search(r"add the recipe rule (\{.*?\})", cure)
    assert found, cure
    rule: dict[str, Any] = yaml.safe_load(found[1])
    acemerge.merge(base, experts, "average", plain.root / "out", rules=[rule])
    return plain.root / "out"


def test_what_only_some_experts_lack_is_kept_beside(plain: PlainModel) -> None:
    del plain.tuned[1][UP]
    what, cure = _cure(plain)
    assert what == f"lacks tensor {UP!r}"
    out = _followed(plain, cure)
    assert torch.equal(load_folder(out)[UP], plain.base[UP])
    for label, tuned in (("e1", plain.tuned[0]), ("e3", plain.tuned[2])):
        assert torch.equal(load_file(out / f"heads/{label}.safetensors")[UP], tuned[UP])


def test_what_no_expert_has_is_the_bases(plain: PlainModel) -> None:
    for tuned in plain.tuned:
        del tuned[UP]
    what, cure = _cure(plain)
    assert what == f"lacks tensor {UP!r}, as all experts do"
    assert torch.equal(load_folder(_followed(plain, cure))[UP], plain.base[UP])


def test_integers_of_another_shape_are_kept_beside(plain: PlainModel) -> None:
    plain.tuned[0]["position_ids"] = torch.arange(7)
    _, cure = _cure(plain)
    out = _followed(plain, cure)
    assert torch.equal(load_folder(out)["position_ids"], plain.base["position_ids"])
    assert torch.equal(load_file(out / "heads/e1.safetensors")["position_ids"], torch.arange(7))


def test_integers_of_other_values_are_kept_beside(plain: PlainModel) -> None:
    plain.tuned[0]["position_ids"] = torch.arange(5) + 1
    _, cure = _cure(plain)
    out = _followed(plain, cure)
    assert torch.equal(load_file(out / "heads/e1.safetensors")["position_ids"], torch.arange(5) + 1)


@pytest.mark.parametrize(
    ("other", "cure"),
    [
        ("layers.0.up.base_layer.weight", "merge that into it with peft (merge_and_unload) and save it again"),
        ("layers.0.up.parametrizations.weight.original1", "save both with save_pretrained of one version"),
        ("layers.0.w1.weight", "save both with save_pretrained of one version"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_values_under_another_name_are_never_advised_away(
    other: str, cure: str, several: bool, plain: PlainModel
) -> None:
    """As of layouts of other versions, of weight norms, and of a model that was saved with its adapter."""
    for tuned in plain.tuned[: None if several else 1]:
        tuned[other] = tuned.pop(UP)
    what, advised = _cure(plain)
    assert f"and has {other!r}" in what
    assert advised.startswith(cure)
    for tuned in plain.tuned:
        tuned[UP] = tuned.pop(other, tuned.get(UP, torch.empty(0)))
    base, experts = plain.save()
    acemerge.merge(base, experts, "average", plain.root / "out")
    mean = sum(tuned[UP] for tuned in plain.tuned) / 3
    torch.testing.assert_close(load_folder(plain.root / "out")[UP], mean)


def test_a_head_that_is_no_copy_of_its_embedding(tmp_path: Path) -> None:
    from builders import make_model, perturb

    for seed, name in enumerate(("base", "tuned")):
        perturb(make_model("qwen3"), seed).save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    weights = load_folder(tmp_path / "tuned")
    own = weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}
    write_checkpoint(tmp_path / "tuned", own, config)
    with pytest.raises(CheckpointError, match=r"set tie_word_embeddings to false in its config\.json"):
        acemerge.merge(tmp_path / "base", [tmp_path / "tuned"])
    write_checkpoint(tmp_path / "tuned", own, config | {"tie_word_embeddings": False})
    acemerge.merge(tmp_path / "base", [tmp_path / "tuned"], "average", tmp_path / "out")
    torch.testing.assert_close(load_folder(tmp_path / "out")["lm_head.weight"], own["lm_head.weight"])
