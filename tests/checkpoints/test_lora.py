"""LoRA adapters as experts: what peft itself makes of them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, load_folder, make_model, write_adapter
from peft_adapters import merged_by_peft, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import acemerge
import acemerge.planning.pieces
from acemerge.checkpoints.patterns import Budget, Pattern, PatternTable
from acemerge.cli.app import main
from acemerge.errors import CheckpointError, UsageError

UP, DOWN = "layers.0.up", "layers.0.down"


# --- against peft --------------------------------------------------------------------------------------------


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "two kinds of module": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"up_proj": 3, "^model.layers.0.self_attn.v_proj": 5},
        },
    ),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "embedding and head": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head"]}),
    "dora of an embedding": ("llama", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "dora of conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d and a tied head": ("gpt2", {"r": 4, "target_modules": ["c_attn", "lm_head"]}),
    "position embeddings": ("gpt2", {"r": 4, "target_modules": ["wpe"]}),
    "bert": ("bert", {"r": 4, "target_modules": ["query", "dense", "word_embeddings"]}),
    "classifier": ("roberta", {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "encoder and decoder": ("t5", {"r": 2, "target_modules": ["q", "v", "wo"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", FEATURES)
def test_one_adapter_is_what_peft_merges(feature: str, tmp_path: Path) -> None:
    family, config = FEATURES[feature]
    base = tmp_path / "base"
    make_model(family).save_pretrained(base)
    adapter = train(make_model(family), tmp_path / "adapter", **config)
    wanted = merged_by_peft(family, base, adapter).state_dict()
    acemerge.merge(base, [adapter], method="average", out=tmp_path / "out")
    found, before = load_folder(tmp_path / "out"), load_folder(base)
    changed = 0
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
        changed += not torch.equal(value, before[name])
    assert changed >= len(config["target_modules"]) - 1


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_the_base_lacks_is_kept_apart(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    assert isinstance(model.config, LlamaConfig)
    adapter = train(model, tmp_path / "adapter", r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    acemerge.merge(base, [adapter], method="average", out=tmp_path / "out")
    stored = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(tmp_path / "out/heads/adapter.safetensors")["score.weight"], stored)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "up_proj", "model.layers.11.mlp.up_proj", "x.gup_proj"])
@pytest.mark.parametrize(
    "pattern", ["up_proj", r"layers\.1\.mlp\.up_proj", "^up_proj", "(mlp|x).up_proj", "layers.*proj"]
)
def test_patterns_match_as_in_peft(name: str, pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    table = {"nothing": 1.0, pattern: 2.0, ".*": 3.0}
    ours = PatternTable(tuple((Pattern.read(text, Budget()), value) for text, value in table.items()))
    assert ours.find(name, 0.0) == table.get(get_pattern_key(table.keys(), name), 0.0)


# --- against the formula -------------------------------------------------------------------------------------


@pytest.fixture
def factors() -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Of two adapters of the plain model: one of both layers, one of the first."""
    generator = torch.Generator().manual_seed(5)

    def draw(out: int, rank: int, inputs: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)

    return [{UP: draw(8, 2, 6), DOWN: draw(6, 2, 8)}, {UP: draw(8, 3, 6)}]


def test_two_adapters_by_task_arithmetic(plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    base, _ = plain.save()
    adapters = [write_adapter(plain.root / f"a{i}", f, lora_alpha=5) for i, f in enumerate(factors)]
    acemerge.merge(base, adapters, method="task_arithmetic", scale=0.7, weights=[1.0, 2.0], out=plain.root / "out")
    found = load_folder(plain.root / "out")
    for name, W0 in plain.base.items():
        module, wanted = name.removesuffix(".weight"), W0.double()
        for weight, own in zip((1.0, 2.0), factors, strict=True):
            if module in own and name.endswith("weight"):
                A, B = own[module]
                wanted = wanted + 0.7 * weight * 5 / len(A) * (B.double() @ A.double())
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=1e-6, atol=1e-6)


def full(plain: PlainModel, own: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The model that an adapter with alpha = r stands for."""
    return plain.base | {f"{m}.weight": plain.base[f"{m}.weight"] + B @ A for m, (A, B) in own.items()}


@pytest.mark.parametrize("method", ["ace", "ties", "dare_linear", "slerp", "tsv_m", "emr"])
def test_an_adapter_beside_a_full_expert(
    method: str, plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acemerge.planning.pieces, "_PIECE", 30)  # tensors in ranges of rows where they can be
    base, experts = plain.save()
    adapter = write_adapter(plain.root / "adapter", factors[0])
    acemerge.merge(base, [adapter, experts[0]], method=method, compute_dtype="float64", out=plain.root / "out")
    wide = [{n: v.double() if v.is_floating_point() else v for n, v in m.items()} for m in (plain.base, plain.tuned[0])]
    doubles = {m: (A.double(), B.double()) for m, (A, B) in factors[0].items()}
    tuned = wide[0] | {f"{m}.weight": wide[0][f"{m}.weight"] + B @ A for m, (A, B) in doubles.items()}
    wanted = acemerge.merge_state_dicts(wide[0], [tuned, wide[1]], method=method)
    found = load_folder(plain.root / "out")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=1e-6, atol=1e-6)


def test_an_update_is_not_rounded_into_the_base_first(plain: PlainModel) -> None:
    base, _ = plain.save()
    A, B = torch.full((1, 6), 1e-5), torch.full((8, 1), 1e-4)
    adapter = write_adapter(plain.root / "adapter", {UP: (A, B)})
    report = acemerge.merge(base, [adapter], method="average")
    exact = (B.double() @ A.double()).square().sum().item()
    assert report.tensors[f"{UP}.weight"]["energies"] == [pytest.approx(exact, rel=1e-6)]


def test_what_no_adapter_changes_is_the_bases(
    plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    base, _ = plain.save()
    report = acemerge.merge(base, [write_adapter(plain.root / "a", factors[1])], out=plain.root / "out")
    found = load_folder(plain.root / "out")
    for name, value in plain.base.items():
        assert torch.equal(found[name], value) == (name != f"{UP}.weight")
    assert report.tensors[f"{DOWN}.weight"]["reason"] == "no adapter changes it: the base's own"


# --- what is said --------------------------------------------------------------------------------------------


def test_adapters_are_named_and_hashed(
    plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = plain.save()
    adapters = [write_adapter(plain.root / f"a{i}", own) for i, own in enumerate(factors)]
    arguments = ["--base", str(base), "--expert", str(adapters[0]), "--expert", str(adapters[1])]
    for command in (["plan", *arguments], ["merge", *arguments, "-o", str(plain.root / "out")]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert "expert a0: LoRA adapter, rank 2, 2 tensors" in said
        assert "share A" not in said
    manifest = json.loads((plain.root / "out/acemerge.json").read_text())
    assert manifest["adapters"] == {"a0": "LoRA adapter, rank 2, 2 tensors", "a1": "LoRA adapter, rank 3, 1 tensors"}
    assert set(manifest["inputs"][1]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "`a1` (LoRA adapter, rank 3, 1 tensors)" in (plain.root / "out/README.md").read_text()


def test_a_changed_alpha_is_another_run(plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    base, _ = plain.save()
    adapter = write_adapter(plain.root / "a", factors[0])
    acemerge.merge(base, [adapter], out=plain.root / "out", resume=True)
    write_adapter(plain.root / "a", factors[0], lora_alpha=7)
    with pytest.raises(UsageError, match="finished merge of another run"):
        acemerge.merge(base, [adapter], out=plain.root / "out", resume=True)


def test_a_frozen_first_factor_is_warned_of(plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    base, _ = plain.save()
    frozen = {m: (A * (1 + 1e-8), B + 1) for m, (A, B) in factors[0].items()}
    adapters = [write_adapter(plain.root / f"a{i}", own) for i, own in enumerate((factors[0], frozen))]
    (warning,) = acemerge.merge(base, adapters, "ace").manifest["warnings"]
    assert "share A in all 2 layers" in warning
    A, B = frozen[UP]
    A[0, 0] += 1e-3
    write_adapter(plain.root / "a1", frozen | {UP: (A, B)})
    (warning,) = acemerge.merge(base, adapters, "ace").manifest["warnings"]
    assert "share A in 1 of 2 layers" in warning


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_qalora": True}, "'use_qalora' is set"),
        ({"lora_bias": True}, "'lora_bias' is set"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is set"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
        ({"megatron_config": {"a": 1}}, "'megatron_config' is set"),
        ({"of_tomorrow": 3}, "'of_tomorrow' is set"),
        ({"init_lora_weights": "pissa"}, "may have changed the base's weights"),
        ({"init_lora_weights": "eva"}, "may have changed the base's weights"),
        ({"r": 3}, "its rank is 3"),
        ({"r": 0}, "'r' is '0', not a rank"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is 'nan'"),
        ({"rank_pattern": {"up": 5}}, "its rank is 5"),
        ({"rank_pattern": {r"(a)\1": 2}}, "uses groupref"),
        ({"alpha_pattern": {"a(": 2}}, "is no regular expression"),
        ({"modules_to_save": "lm_head"}, "is no list of names"),
        ({"alpha_pattern": ["up"]}, "is no table"),
        ({"use_dora": True}, "lacks the tensor lora_magnitude"),
    ],
)
def test_what_would_change_the_weights_is_refused(
    config: dict[str, Any], message: str, plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    base, _ = plain.save()
    adapter = write_adapter(plain.root / "a", factors[0], **config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        acemerge.merge(base, [adapter], out=plain.root / "out")
    assert not (plain.root / "out").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.up.lora_A.weight", (2, 6), "does not begin with"),
        ("base_model.model.layers.0.up.lora_B.bias", (8,), "cannot be read"),
        ("base_model.model.layers.0.up.lora_magnitude_vector", (8,), "has the tensor lora_magnitude"),
        ("base_model.model.layers.0.up.lora_A.other.weight", (2, 6), "one of two for the same layer"),
        ("base_model.model.layers.0.norm.lora_A.weight", (2, 6), "lacks the tensor lora_B"),
        ("base_model.model.layers.0.up.weight", (8, 6), "both whole and as factors"),
    ],
)
def test_stray_tensors_are_refused(
    name: str, shape: tuple[int, ...], message: str, plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    base, _ = plain.save()
    adapter = write_adapter(plain.root / "a", factors[0])
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(shape)}, file)
    with pytest.raises(CheckpointError, match=message):
        acemerge.merge(base, [adapter])


@pytest.mark.parametrize(
    ("module", "A", "B", "message"),
    [
        ("layers.7.up", (2, 6), (8, 2), "changes tensor 'layers.7.up.weight', which the base lacks"),
        (UP, (2, 5), (8, 2), re.escape("'layers.0.up.weight' has shape [8, 5], but [8, 6] in the base")),
        (UP, (2, 6, 1), (8, 2), "no matrices"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    module: str, A: tuple[int, ...], B: tuple[int, ...], message: str, plain: PlainModel
) -> None:
    base, _ = plain.save()
    adapter = write_adapter(plain.root / "a", {module: (torch.ones(A), torch.ones(B))})
    with pytest.raises(CheckpointError, match=message):
        acemerge.merge(base, [adapter])


def test_folders_that_are_not_what_they_seem(
    plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    base, experts = plain.save()
    adapter = write_adapter(plain.root / "a", factors[0])
    with pytest.raises(CheckpointError, match="is an adapter, which is no base"):
        acemerge.merge(adapter, experts)
    with pytest.raises(CheckpointError, match=r"both adapter_config\.json and model\.safetensors"):
        acemerge.merge(base, [write_adapter(experts[0], factors[0])])
    with pytest.raises(UsageError, match="vocabulary base: expert a is an adapter"):
        acemerge.merge(base, [adapter], vocabulary="base")
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    merged = acemerge.merge(base, [adapter]).tensors
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only pickled weights"):
        acemerge.merge(base, [adapter])
    pickled = acemerge.merge(base, [adapter], allow_pickle=True).tensors
    assert [r.get("energies") for r in pickled.values()] == [r.get("energies") for r in merged.values()]


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_what_is_not_finite_is_named(
    where: str, plain: PlainModel, factors: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    _, B = factors[0][UP]
    if where == "base":
        plain.base[f"{UP}.weight"][3, 2] = torch.nan
    else:
        B[3, 1] = torch.inf
    base, experts = plain.save()
    adapter = write_adapter(plain.root / "a", factors[0])
    name = (
        "base: tensor 'layers.0.up.weight' is nan at [3, 2]" if where == "base" else "lora_B.weight' is inf at [3, 1]"
    )
    with pytest.raises(CheckpointError, match=re.escape(name)):
        acemerge.merge(base, [adapter])
    if where == "adapter":
        report = acemerge.merge(base, [adapter, experts[0]], nonfinite="skip-expert")
        assert report.tensors[f"{UP}.weight"]["skipped_experts"] == ["a"]
