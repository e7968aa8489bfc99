"""Models with a tied head among models with a head of their own: written whole, nothing dropped, said in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder, make_model, perturb, write_adapter, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

import acemerge
from acemerge.api import run_opened
from acemerge.engine.convert import open_conversion
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError

NAMES = {
    "qwen3": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),  # and a bias
    "bart": ("model.shared.weight", "lm_head.weight"),
}


def _save(folder: Path, family: str, tied: bool, seed: int) -> Path:
    perturb(make_model(family, tie_word_embeddings=tied), seed).save_pretrained(folder)
    return folder


def _head(folder: Path, family: str, tied: bool) -> Tensor:
    embedding, head = NAMES[family]
    return load_folder(folder)[embedding if tied else head].double()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("tied", [(True, True, False), (False, True, False), (False, True, True)], ids=str)
def test_the_head_of_a_tied_model_is_its_embedding(family: str, tied: tuple[bool, ...], tmp_path: Path) -> None:
    base, *experts = (_save(tmp_path / f"m{i}", family, is_tied, i) for i, is_tied in enumerate(tied))
    report = acemerge.merge(base, experts, "average", out=tmp_path / "out", force=True)
    merged, (embedding, head) = load_folder(tmp_path / "out"), NAMES[family]
    for name, separate in ((embedding, (True,) * 3), (head, tied)):
        expected = sum(_head(*each) for each in zip(experts, (family,) * 2, separate[1:], strict=True)) / 2
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model, info = type(make_model(family)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(model.get_output_embeddings().weight, merged[head])
    assert not torch.equal(merged[embedding], merged[head])
    said = [f"{who}: {head} is {embedding}, to which it is tied" for who in ("base", "expert m1")[not tied[0] :]]
    if tied[0]:
        said.append("the output's head is apart from its embedding, as that of expert m2 is")
    assert set(said) <= set(report.manifest["warnings"])


def _with_head(folder: Path, **flag: Any) -> Path:
    """A T5 with a head of its own, as T5 1.1 and Flan-T5 are; transformers 5 no longer writes it down so."""
    weights = load_folder(folder)
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "tie_word_embeddings"}
    return write_checkpoint(folder, weights | {"lm_head.weight": 2 * weights["shared.weight"].flip(0)}, config | flag)


def test_a_head_that_the_architecture_ties_and_the_model_does_not(tmp_path: Path) -> None:
    base, *experts = (_with_head(_save(tmp_path / f"m{i}", "t5", True, i), tie_word_embeddings=False) for i in range(3))
    acemerge.merge(base, experts, "average", out=tmp_path / "out", force=True)
    merged, tuned = load_folder(tmp_path / "out"), [load_folder(expert) for expert in experts]
    for name in ("shared.weight", "lm_head.weight"):
        torch.testing.assert_close(merged[name], (tuned[0][name] + tuned[1][name]) / 2)
    model = type(make_model("t5")).from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, merged["lm_head.weight"])
    assert torch.equal(model.shared.weight, merged["shared.weight"])
    run_opened(open_conversion(str(base), tmp_path / "new", RunOptions()), tmp_path / "new", RunOptions())
    converted = load_folder(tmp_path / "new")
    assert all(torch.equal(converted[name], value) for name, value in load_folder(base).items())


def test_a_head_that_nobody_says_is_apart_is_refused_with_the_cure(tmp_path: Path) -> None:
    base, expert = (_save(tmp_path / f"m{i}", "qwen3", True, i) for i in range(2))
    weights = load_folder(expert)
    save_file(weights | {"lm_head.weight": weights[NAMES["qwen3"][0]] + 1}, expert / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"should be tied but differ; set tie_word_embeddings to false in its"):
        acemerge.merge(base, [expert])
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    acemerge.merge(base, [expert], "average", out=tmp_path / "out")
    torch.testing.assert_close(load_folder(tmp_path / "out")["lm_head.weight"], weights[NAMES["qwen3"][0]] + 1)


def test_a_missing_head_of_an_untied_model_stays_an_error(tmp_path: Path) -> None:
    base, torn, whole = (_save(tmp_path / f"m{i}", "qwen3", False, i) for i in range(3))
    weights = load_folder(torn)
    del weights["lm_head.weight"]
    save_file(weights, torn / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expert m1: lacks tensor 'lm_head\.weight'"):
        acemerge.merge(base, [torn, whole], force=True)


def test_an_adapter_of_a_tied_matrix_changes_it_in_both_places(tmp_path: Path) -> None:
    base, untied = _save(tmp_path / "base", "qwen3", True, 0), _save(tmp_path / "untied", "qwen3", False, 1)
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(2, 16, generator=generator), torch.randn(40, 2, generator=generator)
    on_head = write_adapter(tmp_path / "on_head", {"lm_head": (A, B)})
    acemerge.merge(base, [untied, on_head], "average", out=tmp_path / "out", force=True)
    merged, before = load_folder(tmp_path / "out"), _head(base, "qwen3", True)
    for name in NAMES["qwen3"]:
        expected = (load_folder(untied)[name].double() + before + B.double() @ A.double()) / 2
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)
