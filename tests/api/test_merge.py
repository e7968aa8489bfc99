"""Merging folders: values, types, streaming, and every mismatch refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, load_folder, write_adapter, write_checkpoint, write_sharded
from conformance import DATA_FREE, RULES
from crossed import crossed, spread
from safetensors.torch import load_file, save_file

import acemerge
from acemerge.errors import AcemergeError, CheckpointError, NumericalError, UsageError


def merge(plain: PlainModel, **options: Any) -> tuple[acemerge.MergeReport, dict[str, torch.Tensor]]:
    base, experts = plain.save()
    report = acemerge.merge(base, experts, out=plain.root / "out", **options)
    return report, load_folder(plain.root / "out")


def refused(plain: PlainModel, error: type[Exception], message: str, **options: Any) -> None:
    """The merge fails as said, and leaves nothing."""
    with pytest.raises(error, match=message):
        merge(plain, **options)
    assert not (plain.root / "out").exists()


def test_linear_layers_get_the_rule_and_the_rest_is_averaged(plain: PlainModel) -> None:
    report, merged = merge(plain, method="task_arithmetic", scale=0.5)
    for name, W0 in plain.base.items():
        if not W0.is_floating_point():
            continue
        total = sum(expert[name] - W0 for expert in plain.tuned)
        factor = 0.5 if report.tensors[name]["rule"] == "task_arithmetic" else 1 / 3
        torch.testing.assert_close(merged[name], W0 + factor * total)
    rules = {name: record["rule"] for name, record in report.tensors.items()}
    assert rules == {
        "embed_tokens.weight": "average",
        "layers.0.up.weight": "task_arithmetic",
        "layers.0.up.bias": "average",
        "layers.0.down.weight": "task_arithmetic",
        "layers.0.norm.weight": "average",
        "position_ids": "base",
    }


def test_the_scale_of_average_holds_for_every_averaged_tensor(plain: PlainModel) -> None:
    _, merged = merge(plain, method="average", scale=0.5)
    W0 = plain.base["layers.0.norm.weight"]
    mean = sum(expert["layers.0.norm.weight"] - W0 for expert in plain.tuned) / 3
    torch.testing.assert_close(merged["layers.0.norm.weight"], W0 + 0.5 * mean)


def test_expert_weights(plain: PlainModel) -> None:
    _, merged = merge(plain, method="average", weights=[1, 0, 3])
    W0, W1, _, W3 = (model["layers.0.up.weight"] for model in (plain.base, *plain.tuned))
    torch.testing.assert_close(merged["layers.0.up.weight"], W0 + ((W1 - W0) + 3 * (W3 - W0)) / 4)


def test_rules_of_the_recipe_come_first(plain: PlainModel) -> None:
    rules = [
        {"match": "*.down.*", "action": "base"},
        {"match": "*.down.*", "method": "average"},
        {"match": "embed*", "method": {"name": "task_arithmetic", "scale": 2.0}},
        {"match": "*.bias", "action": "heads"},
    ]
    report, merged = merge(plain, rules=rules)
    assert torch.equal(merged["layers.0.down.weight"], plain.base["layers.0.down.weight"])
    W0 = plain.base["embed_tokens.weight"]
    total = sum(expert["embed_tokens.weight"] - W0 for expert in plain.tuned)
    torch.testing.assert_close(merged["embed_tokens.weight"], W0 + 2 * total)
    assert report.tensors["layers.0.up.bias"]["rule"] == "base"
    assert set(report.manifest["heads"]["e1"]) == {"layers.0.up.bias"}


@pytest.mark.parametrize(("choice", "rule"), [("average", "average"), ("rule", "kron_auto"), ("base", "base")])
def test_embeddings_can_be_chosen(plain: PlainModel, choice: str, rule: str) -> None:
    report, _ = merge(plain, embeddings=choice)
    assert report.tensors["embed_tokens.weight"]["rule"] == rule


@spread(
    method=[name for name in DATA_FREE if name != "mergekit_linear"],  # a sum of the weights
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_when_nothing_was_tuned_the_bases_bytes_come_back(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    plain = PlainModel(tmp_path, dtype)
    plain.base["layers.0.up.weight"][0, 0] = -0.0
    plain.tuned = [dict(plain.base)] * min(3, RULES[method].experts)
    _, merged = merge(plain, method=method)
    for name, value in plain.base.items():
        assert torch.equal(merged[name].view(torch.uint8), value.view(torch.uint8)), name


def test_bfloat16_is_rounded_once_at_the_end(tmp_path: Path) -> None:
    plain = PlainModel(tmp_path, torch.bfloat16, experts=5)
    _, merged = merge(plain, method="average")
    for name, W0 in plain.base.items():
        if W0.is_floating_point():
            exact = W0.double() + sum(expert[name].double() - W0.double() for expert in plain.tuned) / 5
            assert torch.equal(merged[name], exact.float().bfloat16()), name


def test_mixed_types_are_promoted_and_the_output_follows_the_base(plain: PlainModel) -> None:
    plain.tuned[0] = {n: v.half() if v.is_floating_point() else v for n, v in plain.tuned[0].items()}
    plain.tuned[1] = {n: v.double() if v.is_floating_point() else v for n, v in plain.tuned[1].items()}
    _, merged = merge(plain)
    assert all(merged[name].dtype == value.dtype for name, value in plain.base.items())


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("of_expert", FLOATS, ids=str)
@pytest.mark.parametrize("of_base", FLOATS, ids=str)
def test_every_pair_of_types(tmp_path: Path, of_base: torch.dtype, of_expert: torch.dtype) -> None:
    """Task vectors are taken in float32, in float64 where one side is; the result is rounded to the base's type."""
    plain = PlainModel(tmp_path, of_base, experts=2)
    plain.tuned = [{n: v.to(of_expert) if v.is_floating_point() else v for n, v in e.items()} for e in plain.tuned]
    _, merged = merge(plain, method="average")
    for name, W0 in plain.base.items():
        if W0.is_floating_point():
            exact = W0.double() + sum(expert[name].double() - W0.double() for expert in plain.tuned) / 2
            wide = torch.float64 in (of_base, of_expert)
            if wide:  # computed in float64: nothing but the final rounding is left
                torch.testing.assert_close(merged[name], exact.to(of_base), rtol=1e-14, atol=1e-15)
            else:
                torch.testing.assert_close(merged[name], exact.float().to(of_base))


def test_a_forced_type_reaches_weights_and_config(plain: PlainModel) -> None:
    base, experts = plain.save()
    (base / "config.json").write_text(json.dumps({"dtype": "float32", "x": 1}))
    acemerge.merge(base, experts, out=plain.root / "out", dtype="bfloat16")
    merged = load_folder(plain.root / "out")
    assert merged["layers.0.up.weight"].dtype == torch.bfloat16
    assert merged["position_ids"].dtype == torch.int64
    assert json.loads((plain.root / "out" / "config.json").read_text()) == {"dtype": "bfloat16", "x": 1}


def test_sharded_inputs_and_outputs_hold_the_same_values(plain: PlainModel) -> None:
    _, whole = merge(plain)
    names = list(plain.base)
    models = [plain.base, *plain.tuned]
    for i, model in enumerate(models):
        cut = 2 + i % 3
        shards = [{n: model[n] for n in reversed(names[:cut])}, {n: model[n] for n in names[cut:]}]
        write_sharded(plain.root / f"sharded{i}", shards)
    folders = [plain.root / f"sharded{i}" for i in range(len(models))]
    acemerge.merge(folders[0], folders[1:], out=plain.root / "shards", max_shard_size="300B")
    files = sorted(f.name for f in (plain.root / "shards").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((plain.root / "shards" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    merged = load_folder(plain.root / "shards")
    assert all(torch.equal(merged[name], value) for name, value in whole.items())


def test_workers_do_not_change_a_byte(plain: PlainModel) -> None:
    base, experts = plain.save()
    for workers in (1, 2, 4):
        acemerge.merge(base, experts, out=plain.root / f"w{workers}", workers=workers)
    contents = {(plain.root / f"w{workers}" / "model.safetensors").read_bytes() for workers in (1, 2, 4)}
    assert len(contents) == 1


def test_without_an_output_nothing_is_written(plain: PlainModel) -> None:
    base, experts = plain.save()
    before = sorted(plain.root.rglob("*"))
    report = acemerge.merge(base, experts)
    assert report.out is None
    assert 0 < report.tensors["layers.0.up.weight"]["agreement"] < 1
    assert sorted(plain.root.rglob("*")) == before


def test_state_dicts_merge_like_folders(plain: PlainModel) -> None:
    _, merged = merge(plain)
    before = {name: value.clone() for name, value in plain.base.items()}
    found = acemerge.merge_state_dicts(plain.base, plain.tuned)
    assert found.keys() == plain.base.keys()
    assert all(torch.equal(found[name], merged[name]) for name in found)
    assert all(torch.equal(plain.base[name], value) for name, value in before.items())
    assert all(found[name].data_ptr() != plain.base[name].data_ptr() for name in found)


def test_an_unchanged_state_dict_is_copied_not_shared(plain: PlainModel) -> None:
    found = acemerge.merge_state_dicts(plain.base, [plain.base])
    assert all(found[name].data_ptr() != value.data_ptr() for name, value in plain.base.items())


# --- inputs that do not fit ----------------------------------------------------------------------------------


def test_a_missing_tensor_is_refused_or_kept_by_the_recipe(plain: PlainModel) -> None:
    del plain.tuned[1]["layers.0.up.weight"]
    refused(plain, CheckpointError, r"expert e2: lacks tensor 'layers.0.up.weight'; fetch .* or add the recipe rule")
    report, merged = merge(plain, rules=[{"match": "layers.0.up.weight", "action": "base"}])
    assert torch.equal(merged["layers.0.up.weight"], plain.base["layers.0.up.weight"])
    assert report.manifest["recipe"]["rules"][0]["match"] == "layers.0.up.weight"


def test_a_layer_that_all_experts_lack_is_refused(plain: PlainModel) -> None:
    for expert in plain.tuned:
        del expert["layers.0.up.weight"]
    refused(plain, CheckpointError, "lacks tensor 'layers.0.up.weight', as all experts do")


def test_experts_under_other_names_are_refused(plain: PlainModel) -> None:
    plain.tuned = [{f"student.{name}": value for name, value in expert.items()} for expert in plain.tuned]
    refused(plain, CheckpointError, "expert e1: has no layer under a name of the base's")


def test_an_extra_head_is_kept_and_recorded(plain: PlainModel) -> None:
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    report, merged = merge(plain)
    assert "score.weight" not in merged
    assert report.manifest["heads"] == {"e1": {"score.weight": "missing in the base"}, "e2": {}, "e3": {}}
    assert (plain.root / "out" / "heads" / "e1.safetensors").is_file()


@pytest.mark.parametrize("policy", ["refuse", "base"])
def test_vocabularies_of_different_size(plain: PlainModel, policy: str) -> None:
    plain.tuned[2]["embed_tokens.weight"] = torch.zeros(12, 6)
    if policy == "refuse":
        refused(plain, CheckpointError, r"embed_tokens.weight.*\[12, 6\].*\[11, 6\].*vocabularies")
    else:
        _, merged = merge(plain, rules=[{"match": "embed_tokens.weight", "action": "base"}])
        assert torch.equal(merged["embed_tokens.weight"], plain.base["embed_tokens.weight"])


@pytest.mark.parametrize("name", ["layers.0.up.weight", "layers.0.up.bias", "layers.0.norm.weight"])
def test_a_model_of_another_size_is_refused(plain: PlainModel, name: str) -> None:
    plain.tuned[0][name] = torch.zeros([side + 1 for side in plain.tuned[0][name].shape])
    refused(plain, CheckpointError, f"expert e1: tensor '{name}' has shape .* merge models of one size")


def test_a_model_of_another_width_is_no_other_vocabulary(plain: PlainModel) -> None:
    narrow = {name: value[..., :5].contiguous() for name, value in plain.base.items() if value.is_floating_point()}
    plain.tuned[0] |= narrow
    said = r"embed_tokens\.weight' has shape \[11, 5\], but \[11, 6\] .*; merge models of one size"
    refused(plain, CheckpointError, said)


def test_an_adapter_with_more_tokens_is_sent_to_the_base_that_it_was_trained_on(plain: PlainModel) -> None:
    base, experts = plain.save()
    up = (torch.zeros(2, 6), torch.zeros(8, 2))
    lora = write_adapter(plain.root / "lora", {"layers.0.up": up})
    more = {"base_model.model.embed_tokens.weight": torch.zeros(14, 6)}
    save_file(load_file(lora / "adapter_model.safetensors") | more, lora / "adapter_model.safetensors")
    for vocabulary in ("refuse", "union"):
        with pytest.raises(AcemergeError, match=r"merge it .*with peft|with peft first") as failure:
            acemerge.merge(base, [lora, experts[0]], vocabulary=vocabulary)
        assert "--vocabulary" not in str(failure.value)


def test_another_architecture_is_refused(plain: PlainModel) -> None:
    base, experts = plain.save()
    write_checkpoint(base, plain.base, {"model_type": "bert"})
    write_checkpoint(experts[1], plain.tuned[1], {"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="expert e2: is a 'gpt2' model, but the base is 'bert'"):
        acemerge.merge(base, experts)


def test_integer_tensors_must_agree(plain: PlainModel) -> None:
    plain.tuned[1]["position_ids"] = torch.arange(1, 6)
    refused(plain, CheckpointError, "expert e2: integer tensor 'position_ids' differs")
    plain.tuned[1]["position_ids"] = torch.arange(6)
    refused(plain, CheckpointError, "expert e2: integer tensor 'position_ids' differs")
    del plain.tuned[1]["position_ids"]
    _, merged = merge(plain)
    assert torch.equal(merged["position_ids"], torch.arange(5))


def test_an_integer_weight_for_a_float_is_refused(plain: PlainModel) -> None:
    plain.tuned[0]["layers.0.up.weight"] = plain.tuned[0]["layers.0.up.weight"].to(torch.int8)
    refused(plain, CheckpointError, "expert e1: tensor 'layers.0.up.weight' is torch.int8.*that it was quantised from")


@crossed(
    name=["layers.0.up.weight", "layers.0.norm.weight", "embed_tokens.weight"],
    where=["base", "e2"],
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    value=[float("nan"), float("inf"), float("-inf")],
)
def test_values_that_are_not_finite(tmp_path: Path, name: str, where: str, dtype: torch.dtype, value: float) -> None:
    plain = PlainModel(tmp_path, dtype)
    model = plain.base if where == "base" else plain.tuned[1]
    model[name].view(-1)[4] = value
    refused(plain, CheckpointError, rf"{where}: tensor '{name}' is -?(nan|inf) at \[")


def test_an_expert_that_is_not_finite_can_be_skipped(plain: PlainModel) -> None:
    plain.tuned[1]["layers.0.up.weight"][0, 0] = float("nan")
    report, merged = merge(plain, method="average", nonfinite="skip-expert")
    assert report.tensors["layers.0.up.weight"]["skipped_experts"] == ["e2"]
    assert "skipped_experts" not in report.tensors["layers.0.down.weight"]
    W0, W1, _, W3 = (model["layers.0.up.weight"] for model in (plain.base, *plain.tuned))
    torch.testing.assert_close(merged["layers.0.up.weight"], W0 + (W1 + W3 - 2 * W0) / 2)


def test_float16_overflow_names_tensor_and_magnitude(plain: PlainModel) -> None:
    plain.base["layers.0.norm.weight"][2] = 1e5
    plain.tuned = [dict(plain.base) | {"layers.0.norm.weight": plain.base["layers.0.norm.weight"] + 1}]
    refused(plain, NumericalError, r"layers.0.norm.weight.*largest magnitude 100001 overflows float16", dtype="float16")


def test_a_head_that_is_not_finite_is_refused(plain: PlainModel) -> None:
    plain.tuned[0]["score.weight"] = torch.full((3, 6), float("nan"))
    refused(plain, CheckpointError, "expert e1: tensor 'score.weight' is nan")


@pytest.mark.parametrize(
    "options",
    [
        {"workers": "2", "max_shard_size": 1000},
        {"device": torch.device("cpu"), "max_memory": "8GB", "overwrite": "yes"},
        {"max_shard_size": "0.1 MiB", "max_memory": 8 * 10**9},
    ],
)
def test_options_mean_what_they_say(plain: PlainModel, options: dict[str, Any]) -> None:
    _, plainly = merge(plain)
    _, merged = merge(plain, **{"overwrite": True, **options})
    assert all(torch.equal(merged[name], value) for name, value in plainly.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers: 0 is not a number of workers; use 1 or more"),
        ({"workers": "two"}, "--workers: 'two' is not a number of workers"),
        ({"max_shard_size": "big"}, "--max-shard-size: 'big' is not a size in bytes; write for example 5GB or 512MiB"),
        ({"max_shard_size": 0}, "--max-shard-size: 0 is not a size"),
        ({"max_memory": -1}, "--max-memory: -1 is not a size"),
        ({"max_memory": 8}, "--max-memory: tensor .* more than 8; allow more"),
        ({"device": 3}, "--device: 3 is wrong: input should be a valid string; see `acemerge merge --help`"),
        ({"resume": "perhaps"}, "--resume: 'perhaps' is wrong: input should be a valid boolean"),
    ],
)
def test_wrong_options_are_named(plain: PlainModel, options: dict[str, Any], message: str) -> None:
    refused(plain, UsageError, message, **options)


def test_usage_errors(plain: PlainModel) -> None:
    base, experts = plain.save()
    with pytest.raises(UsageError, match="at least one expert"):
        acemerge.merge(base, [], out=plain.root / "out")
    with pytest.raises(UsageError, match="no parameter 'stpe'; did you mean `step`"):
        acemerge.merge(base, experts, stpe=1)
    with pytest.raises(UsageError, match="unknown device"):
        acemerge.merge(base, experts, device="tpu")
    with pytest.raises(UsageError, match="needs a matrix"):
        acemerge.merge(base, experts, rules=[{"match": "*norm*", "method": "ace"}])
