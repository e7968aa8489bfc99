"""Cures are followed to the letter: each leads to an output, and throws no expert's values away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import PlainModel, load_folder, write_adapter, write_checkpoint
from commands import run
from safetensors.torch import load_file, save_file

import acemerge
from acemerge.api import run_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, NumericalError, UsageError
from acemerge.recipes.recipe import make_recipe
from acemerge.tasks.networks import MERGE_ALONE
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE

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


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_integers_of_other_values_are_kept_beside(shape: tuple[int, ...], plain: PlainModel) -> None:
    for model in (plain.base, *plain.tuned):
        model["position_ids"] = model["position_ids"].view(shape)
    plain.tuned[0]["position_ids"] = (torch.arange(5) + 1).view(shape)
    _, cure = _cure(plain)
    out = _followed(plain, cure)
    assert torch.equal(load_file(out / "heads/e1.safetensors")["position_ids"].flatten(), torch.arange(5) + 1)


def test_a_rule_that_is_advised_counts_where_another_matches_too(plain: PlainModel) -> None:
    """The first one that matches counts, and so the cure says where it belongs."""
    del plain.tuned[0][UP]
    base, experts = plain.save()
    others = [{"match": "*.weight", "method": "ties"}]
    with pytest.raises(CheckpointError, match=r"action: heads\} before any other: ") as failure:
        acemerge.merge(base, experts, "average", rules=others)
    found = re.search(r"(\{.*?\}) before any other", failure.value.cure)
    assert found
    acemerge.merge(base, experts, "average", plain.root / "out", rules=[yaml.safe_load(found[1]), *others])
    assert torch.equal(load_folder(plain.root / "out")[UP], plain.base[UP])


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


def test_names_of_one_embedding_that_differ_where_no_head_is_among_them(tmp_path: Path) -> None:
    """No configuration unties them, and transformers writes both again: each expert's own are kept beside."""
    from builders import make_model, perturb

    for seed, name in enumerate(("base", "tuned")):
        perturb(make_model("t5"), seed).save_pretrained(tmp_path / name)
    weights = load_folder(tmp_path / "tuned")
    own = weights | {"encoder.embed_tokens.weight": 2 * weights["shared.weight"]}
    write_checkpoint(tmp_path / "tuned", own)
    with pytest.raises(CheckpointError, match="should be tied but differ; add the recipe rule") as failure:
        acemerge.merge(tmp_path / "base", [tmp_path / "tuned"])
    found = re.search(r"(\{.*?\}) before any other", failure.value.cure)
    assert found
    rules = [yaml.safe_load(found[1])]
    acemerge.merge(tmp_path / "base", [tmp_path / "tuned"], "average", tmp_path / "out", rules=rules)
    kept = load_file(tmp_path / "out/heads/tuned.safetensors")
    assert all(torch.equal(kept[name], own[name]) for name in ("shared.weight", "encoder.embed_tokens.weight"))


def _not_finite(plain: PlainModel) -> None:
    plain.tuned[0][UP][1, 2] = float("nan")


def _lacking(plain: PlainModel) -> None:
    del plain.tuned[0][UP]


def _large(plain: PlainModel) -> None:
    """The mean is within the range of float32, and an update is not."""
    for model, value in zip((plain.base, *plain.tuned), (-3e38, 3e38, -3e38, -3e38), strict=True):
        model[UP][0, 0] = value


def _with_more_tokens(plain: PlainModel) -> None:
    plain.tuned[0]["embed_tokens.weight"] = torch.randn(12, 6)


@pytest.mark.parametrize(
    ("spoil", "cure", "followed"),
    [
        (_not_finite, "load it again, or leave the expert out", lambda tuned: {"experts": tuned[1:]}),
        (_large, "use compute_dtype='float64'", lambda tuned: {"experts": tuned, "compute_dtype": "float64"}),
        (
            _lacking,
            f"fetch the expert again, or put {{'match': '{UP}', 'action': 'heads'}} first in `rules`: the base's stays",
            lambda tuned: {"experts": tuned, "rules": [{"match": UP, "action": "heads"}]},
        ),
        (
            _with_more_tokens,
            "save the models with their tokenizers, and merge the folders with --vocabulary base or union",
            None,
        ),
    ],
)
def test_models_in_memory_get_cures_of_their_own(spoil: Any, cure: str, followed: Any, plain: PlainModel) -> None:
    """Their merges have no options of the command, no heads folder, and nothing to be fetched."""
    spoil(plain)
    with pytest.raises((CheckpointError, NumericalError)) as failure:
        acemerge.merge_state_dicts(plain.base, plain.tuned, "average")
    assert failure.value.cure == cure
    assert str(failure.value).endswith(cure)
    if followed:
        acemerge.merge_state_dicts(plain.base, method="average", **followed(plain.tuned))


@pytest.mark.parametrize(
    ("wrong", "cure", "followed"),
    [
        ({"vocabulary": "base", "embeddings": "rule"}, "use embeddings average", {"embeddings": "average"}),
        ({"vocabulary": "assets"}, "set missing_tokens to base or mean", {"missing_tokens": "mean"}),
        (
            {"vocabulary": "base", "assets": "e"},
            "leave assets out, or set missing_tokens to base or mean",
            {"missing_tokens": "mean"},
        ),
        ({"missing_tokens": "mean"}, "set vocabulary to base, union or assets", {"vocabulary": "union"}),
        (
            {"vocabulary": "base", "missing_tokens": "mean", "nonfinite": "skip-expert"},
            "leave nonfinite out, or leave out the expert that is not finite",
            {"nonfinite": "error"},
        ),
        ({"split_qkv": True, "policy": "paper"}, "leave it out, or use policy default", {"policy": "default"}),
        ({"as_lora": 2, "vocabulary": "base"}, "leave `vocabulary` out, or write a full model", {"as_lora": None}),
        ({"as_lora": True}, "see docs/recipes.md", {"as_lora": 2}),
        ({"compress": "first"}, "leave it out", {"compress": "last"}),
        ({"join_qkv": True, "split_qkv": True}, "leave one of them out", {"split_qkv": False}),
        ({"policy": "papr"}, r"did you mean `paper`\?", {"policy": "paper"}),
        ({"base": 2024}, "put it in quotes", {"base": "2024"}),
        (
            {"rules": [{"match": "*", "method": "ties", "weights": [1, 2]}]},
            "give one weight each",
            {"rules": [{"match": "*", "method": "ties", "weights": [1]}]},
        ),
        (
            {"rules": [{"match": "*"}]},
            "give one of the two",
            {"rules": [{"match": "*", "action": "base"}]},
        ),
        (
            {"slices": [{"base": [0, 2], "experts": []}]},
            "give one each, null for an expert that is no part of it",
            {"slices": [{"base": [0, 2], "experts": [None]}]},
        ),
        (
            {"slices": [{"base": [0, 2], "base_from": 2, "experts": [[0, 2]]}]},
            "count them from 1, and name the base by 0",
            {"slices": [{"base": [0, 2], "base_from": 1, "experts": [[0, 2]]}]},
        ),
        (
            {"slices": [{"base": [0, 2], "experts": [[0, 1]]}]},
            r"give \[first, end\) of as many layers each",
            {"slices": [{"base": [0, 2], "experts": [[1, 3]]}]},
        ),
    ],
)
def test_what_does_not_go_together_in_a_recipe(wrong: dict[str, Any], cure: str, followed: dict[str, Any]) -> None:
    """The error is one of ours, without the whole recipe in it; what it advises is taken."""
    recipe = {"base": "b", "experts": ["e"], **wrong}
    with pytest.raises(UsageError, match=f"; {cure}$"):
        make_recipe(recipe)
    make_recipe(recipe | followed)


def test_an_adapter_by_itself_keeps_all_of_its_update(plain: PlainModel) -> None:
    base, _ = plain.save()
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    adapter = write_adapter(plain.root / "lora", {UP.removesuffix(".weight"): (A, B)})
    found = re.search(r"by --method (\w+)", MERGE_ALONE)
    assert found
    acemerge.merge(base, [adapter], found[1], plain.root / "alone")
    torch.testing.assert_close(load_folder(plain.root / "alone")[UP], plain.base[UP] + B @ A)


def test_a_scale_that_overflows(plain: PlainModel) -> None:
    """Each cure in turn, until there is an output, or the scale alone is left to change."""
    base, experts = plain.save()
    asked: dict[str, Any] = {"scale": 1e40, "dtype": "float16"}
    cures = []
    while asked["scale"] > 1:
        with pytest.raises(NumericalError) as failure:
            acemerge.merge(base, experts, "average", **asked)
        cures.append(failure.value.cure)
        asked |= {
            "use --compute-dtype float64": {"compute_dtype": "float64"},
            "write --dtype bfloat16 or float32": {"dtype": "bfloat16"},
            "use a smaller scale": {"scale": 1.0},
        }[failure.value.cure]
    assert len(set(cures)) == len(cures) == 3  # none came twice
    acemerge.merge(base, experts, "average", **asked)


def test_an_average_is_not_advised_where_it_is_what_takes_too_much(plain: PlainModel) -> None:
    base, experts = plain.save()
    with pytest.raises(UsageError, match=r"by average needs [\d,]+ bytes, more than 1; allow more$"):
        acemerge.merge(base, experts, "average", max_memory=1)


def test_one_expert_that_is_not_finite_is_not_to_be_left_out(plain: PlainModel) -> None:
    plain.tuned[0][UP][1, 2] = float("nan")
    base, experts = plain.save()
    with pytest.raises(CheckpointError, match=r"; fetch it again$"):
        acemerge.merge(base, experts[:1], "average")
    with pytest.raises(CheckpointError, match=r"or leave the expert out with --nonfinite skip-expert$"):
        acemerge.merge(base, experts, "average")
    acemerge.merge(base, experts, "average", nonfinite="skip-expert")


def test_whether_the_weights_of_a_model_are_finite(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.base[UP][1, 2] = float("nan")
    base, _ = plain.save()
    command = re.search(r"acemerge (.*) tells", ARE_WEIGHTS_FINITE)
    assert command
    told = run(capsys, *command[1].replace("MODEL", str(base)).split())
    assert told[0] == 3
    assert f"base: tensor '{UP}' is nan at [1, 2]" in told[2]


def test_options_of_other_commands_are_said_to_be(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, (expert, *_) = plain.save()
    pickled = plain.root / "pickled"
    pickled.mkdir()
    torch.save(plain.tuned[0], pickled / "pytorch_model.bin")
    (plain.root / "tasks.yaml").write_text("tasks: [{name: a, kind: perplexity, data: ./a.txt}]")
    words = ("--base", base, "--expert", pickled)
    _, _, said = run(capsys, "merge", *words, "-o", plain.root / "out")
    assert said.endswith("add --allow-pickle to read it as plain data\n")
    _, _, said = run(capsys, "evaluate", pickled, "--tasks", plain.root / "tasks.yaml")
    assert "(--allow-pickle is an option of acemerge merge, " in said
    assert run(capsys, "convert", pickled, plain.root / "converted", "--allow-pickle", "--quiet")[0] == 0
    # A rule that wants data may be looked at, too: what is refused is the file.
    words = ("--base", base, "--expert", expert, "--method", "regmean")
    _, _, said = run(capsys, "inspect", *words, "--calibration", plain.root / "nowhere.yaml")
    assert "nowhere.yaml: no such file" in said


def test_keys_that_are_no_options_are_said_to_be_of_recipe_files(
    plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (expert, *_) = plain.save()
    words = ("-o", plain.root / "out", "--vocabulary", "assets")
    _, _, said = run(capsys, "merge", "--base", base, "--expert", expert, *words)
    assert said.endswith("set missing_tokens to base or mean (missing_tokens is a key of a recipe file)\n")
    recipe = plain.root / "recipe.yaml"
    recipe.write_text("base: ./base\nexperts: [./e1]\nmissing_tokens: mean\n")
    _, _, said = run(capsys, "merge", recipe, *words)
    assert "base: has no list of tokens to match the vocabularies by" in said


def test_a_folder_that_cannot_be_written_is_not_called_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, _, said = run(capsys, "demo", "-o", tmp_path / "file")
    assert code == 5
    assert said.startswith(f"acemerge: error: {tmp_path / 'file'}: ")


def test_an_output_that_was_altered_is_made_again(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    """`--resume` finds the same damage: the cure names the option that does not."""
    base, (expert, *_) = plain.save()
    words = ("merge", "--base", base, "--expert", expert, "--quiet", "-o", plain.root / "out")
    for file, first in (("model.safetensors", "was altered"), ("acemerge.json", "its digest does not match")):
        assert run(capsys, *words, "--overwrite")[0] == 0
        path = plain.root / "out" / file
        path.write_bytes(path.read_bytes().replace(b"F32", b"F16", 1).replace(b"average", b"averagf", 1))
        for command in (("verify", plain.root / "out"), (*words, "--resume")):
            code, _, said = run(capsys, *command)
            assert code == 3
            assert re.search(f"{first}.*; make the output again with --overwrite, or restore the file", said)
    assert run(capsys, *words, "--overwrite")[0] == 0
    assert run(capsys, "verify", plain.root / "out")[0] == 0
    with pytest.raises(CheckpointError, match=r"masks/e1.*: there is none; merge by --method emr"):
        acemerge.expert_weights(plain.root / "out", base, "e1")
    assert run(capsys, *words, "--overwrite", "--method", "emr")[0] == 0
    assert acemerge.expert_weights(plain.root / "out", base, "e1")


def test_a_model_and_its_adapter_are_named_as_a_recipe_names_them(
    plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (expert, other, _) = plain.save()
    adapter = write_adapter(plain.root / "lora", {"layers.0.up": (torch.randn(2, 6), torch.randn(8, 2))})
    recipe = plain.root / "recipe.yaml"

    def planned(model: Path, applied: Path) -> tuple[int, str]:
        recipe.write_text(
            yaml.safe_dump({"base": str(base), "experts": [{"model": str(model), "adapter": str(applied)}]})
        )
        code, _, said = run(capsys, "plan", recipe)
        return code, said

    for model, applied, what in ((expert, other, "is no adapter"), (adapter, adapter, "is an adapter")):
        code, said = planned(model, applied)
        assert code == 3
        assert f"{what}; name both, as {{model: MODEL, adapter: ADAPTER}}, or in a recipe of mergekit as" in said
    assert planned(expert, adapter)[0] == 0


def test_an_adapter_without_its_configuration_is_not_sent_round(plain: PlainModel) -> None:
    """The file alone wants its folder, and the folder the configuration."""
    base, _ = plain.save()
    adapter = write_adapter(plain.root / "lora", {"layers.0.up": (torch.randn(2, 6), torch.randn(8, 2))})
    config = (adapter / "adapter_config.json").read_bytes()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"; name its folder$"):
        acemerge.merge(base, [adapter / "adapter_model.safetensors"])
    with pytest.raises(CheckpointError, match=r"; fetch its adapter_config\.json too, which says how it is applied$"):
        acemerge.merge(base, [adapter])
    (adapter / "adapter_config.json").write_bytes(config)
    acemerge.merge(base, [adapter])


def test_an_adapter_on_a_model_of_its_own_need_not_fit_the_base(tmp_path: Path) -> None:
    """Its model has more tokens than the base, and is merged by token once the adapter is in it."""
    from vocabularies import EXPERTS, WORDS, save

    base, model = save(tmp_path / "base", WORDS, 0), save(tmp_path / "model", EXPERTS[0], 1)
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    adapter = write_adapter(tmp_path / "lora", {})
    start = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{start}A": A, f"{start}B": B}, adapter / "adapter_model.safetensors")
    content = {"base": str(base), "experts": [{"model": str(model), "adapter": str(adapter)}], "vocabulary": "base"}
    content |= {"method": "average"}

    def merged() -> None:
        run_recipe(make_recipe(content), tmp_path / "out", RunOptions())

    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(
        CheckpointError, match=r"but \[5, 8\] in the base; merge it into its base with peft .* that folder$"
    ):
        merged()
    name = "model.embed_tokens.weight"
    weights = load_folder(model)
    write_checkpoint(model, weights | {name: weights[name] + (B @ A).T})
    content["experts"] = [str(model)]
    merged()
    expected = weights[name] + (B @ A).T
    torch.testing.assert_close(load_folder(tmp_path / "out")[name], expected[: len(WORDS)])
