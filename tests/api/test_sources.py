"""Experts as their users saved them: with a wrapper's prefix, with their own tokenizer, of another base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.verify import verify


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "model."])
def test_a_wrappers_prefix_is_taken_off_and_reported(tmp_path: Path, prefix: str) -> None:
    plain = PlainModel(tmp_path)
    base, experts = plain.save()
    wrapped = write_checkpoint(tmp_path / "wrapped", {prefix + name: value for name, value in plain.tuned[0].items()})
    report = acemerge.merge(base, [wrapped, *experts[1:]], "kron_auto", tmp_path / "out")
    acemerge.merge(base, experts, "kron_auto", tmp_path / "plain")
    expected = load_folder(tmp_path / "plain")
    assert all(torch.equal(value, expected[name]) for name, value in load_folder(tmp_path / "out").items())
    assert report.manifest["warnings"] == [f"expert wrapped: read without the prefix {prefix!r} of its names"]


def _each_layer(name: str, wrapper: str) -> str:
    return re.sub(r"(layers\.\d+)\.", rf"\1.{wrapper}.", name)


WRAPPED: dict[str, Callable[[str], str]] = {
    "activations computed again": lambda name: _each_layer(name, "_checkpoint_wrapped_module"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + _each_layer(name, "_fsdp_wrapped_module"),
    "each layer compiled": lambda name: _each_layer(name, "_orig_mod"),
    "all at once": lambda name: "module." + _each_layer(name, "_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "Lightning with DeepSpeed": lambda name: "_forward_module." + name,
    "a head for values beside it": lambda name: "pretrained_model." + name,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_within_names_and_of_trainers_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    plain = PlainModel(tmp_path, experts=2)
    base, experts = plain.save()
    named = {WRAPPED[wrapper](name): value for name, value in plain.tuned[0].items()}
    beside = {"v_head.summary.weight": torch.zeros(1, 6)} if "beside" in wrapper else {}
    wrapped = write_checkpoint(tmp_path / "wrapped", named | beside)
    report = acemerge.merge(base, [wrapped, experts[1]], out=tmp_path / "out")
    acemerge.merge(base, experts, out=tmp_path / "plain")
    expected, found = load_folder(tmp_path / "plain"), load_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert sum("of its names" in w or "within its names" in w for w in report.manifest["warnings"]) == 1
    assert [*report.manifest["heads"].get("wrapped", {})] == list(beside)


def test_a_base_that_has_a_wrapper_in_its_names_keeps_it(tmp_path: Path) -> None:
    plain = PlainModel(tmp_path)
    _, experts = plain.save()
    named = {name.replace("layers.0.", "layers.0._orig_mod."): value for name, value in plain.base.items()}
    base = write_checkpoint(tmp_path / "compiled", named)
    acemerge.merge(base, experts, out=tmp_path / "out")
    acemerge.merge(tmp_path / "base", experts, out=tmp_path / "plain")
    expected = load_folder(tmp_path / "plain")
    found = load_folder(tmp_path / "out")
    assert found.keys() == named.keys()
    assert all(torch.equal(value, expected[name.replace("_orig_mod.", "")]) for name, value in found.items())


class Two(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _compiled_within(model: Two) -> Two:
    model.body = torch.compile(model.body)
    return model


IN_MEMORY: dict[str, Callable[[Two], nn.Module]] = {
    "compiled": torch.compile,
    "data-parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "compiled within": _compiled_within,
}


@pytest.mark.parametrize("how", IN_MEMORY)
def test_models_in_memory_are_taken_out_of_their_wrappers(how: str) -> None:
    wrap = IN_MEMORY[how]
    expected = acemerge.merge_models(Two(0), [Two(1), Two(2)], "average").state_dict()
    found = acemerge.merge_models(Two(0), [wrap(Two(1)), Two(2)], "average")
    assert type(found) is Two
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    states = [model.state_dict() for model in (Two(0), wrap(Two(1)), Two(2))]
    merged = acemerge.merge_state_dicts(states[0], states[1:], "average")
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    base = acemerge.merge_models(wrap(Two(0)), [Two(1), Two(2)], "average").state_dict()
    assert [torch.equal(*pair) for pair in zip(base.values(), expected.values(), strict=True)] == [True] * 6


def test_a_model_with_an_adapter_on_it_is_named() -> None:
    import peft

    tuned = peft.get_peft_model(Two(1), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(UsageError, match=r"expert 1: is a PeftModel.*merge_and_unload"):
        acemerge.merge_models(Two(0), [tuned, Two(2)], "average")
    with pytest.raises(CheckpointError, match=r"expert 1: has the factors of a peft adapter.*merge_and_unload"):
        acemerge.merge_state_dicts(Two(0).state_dict(), [tuned.state_dict()], "average")


def test_weights_that_an_adapter_was_left_in_are_told_apart(tmp_path: Path) -> None:
    plain = PlainModel(tmp_path)
    base, experts = plain.save()
    left = {name.replace("up.weight", "up.base_layer.weight"): value for name, value in plain.tuned[0].items()}
    write_checkpoint(experts[0], left)
    with pytest.raises(
        CheckpointError,
        match=r"lacks tensor 'layers\.0\.up\.weight' and has .*: it was saved with an adapter in it; merge that",
    ):
        acemerge.merge(base, experts)


def test_a_prefix_that_is_the_bases_own_stays(tmp_path: Path) -> None:
    plain = PlainModel(tmp_path)
    folders = [
        write_checkpoint(tmp_path / f"m{i}", {f"model.{name}": value for name, value in model.items()})
        for i, model in enumerate([plain.base, *plain.tuned])
    ]
    report = acemerge.merge(folders[0], folders[1:], "kron_auto", tmp_path / "out")
    assert not report.manifest["warnings"]
    assert load_folder(tmp_path / "out").keys() == {f"model.{name}" for name in plain.base}


def _with_files(folder: Path, **contents: str) -> Path:
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_tokenizer_and_templates_follow_the_model_that_is_named(tmp_path: Path) -> None:
    base, experts = PlainModel(tmp_path).save()
    config = (base / "config.json").read_text() if (base / "config.json").exists() else "{}"
    _with_files(base, config__json=config, tokenizer__json="base", chat_template__jinja="base")
    chat = _with_files(experts[1], config__json=config, tokenizer__json="chat", generation_config__json="{}")
    acemerge.merge(base, experts, out=tmp_path / "base-files")
    acemerge.merge(base, experts, out=tmp_path / "chat-files", assets=chat.name)

    def files(name: str) -> dict[str, str]:
        apart = ("acemerge.json", "README.md")
        texts = [path for path in (tmp_path / name).iterdir() if path.suffix in (".json", ".jinja")]
        return {path.name: path.read_text() for path in texts if path.name not in apart}

    assert files("base-files") == {"config.json": config, "tokenizer.json": "base", "chat_template.jinja": "base"}
    assert files("chat-files") == {"config.json": config, "tokenizer.json": "chat", "generation_config.json": "{}"}
    with pytest.raises(UsageError, match="'math' is none of the models"):
        acemerge.merge(base, experts, assets="math")
    with pytest.raises(UsageError, match=f"{experts[0].name} has no tokenizer"):
        acemerge.merge(base, experts, assets=experts[0].name)


# All that processors and tokenizers of transformers write, and what must stay behind.
ASSETS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
    "modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors",
)  # fmt: skip
NO_ASSETS = (
    *("processing.py", "training_args.bin", "additional_chat_templates/evil.py", "notes.jinja", "more/rag.jinja"),
    *("2_Dense/pytorch_model.bin", "2_Dense/module.py", "3_Training/config.json"),
)


def _put_files(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"linear.weight": torch.ones(3, 6)}, folder / name)
        else:
            (folder / name).write_text(f"{folder.name}'s {name}")
    return folder


def test_every_file_beside_the_weights_follows_whoever_is_named(tmp_path: Path) -> None:
    base, experts = PlainModel(tmp_path).save()
    _put_files(base, ("tokenizer.json", "preprocessor_config.json", "additional_chat_templates/base.jinja"))
    _put_files(experts[1], (*ASSETS, *NO_ASSETS))
    report = acemerge.merge(base, experts, out=tmp_path / "out", assets="e2")
    alone = "2_Dense is not in the base: the output has that of expert e2, as it is"
    assert alone in report.manifest["warnings"]
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    heads = "heads/e2.safetensors"
    assert written == {*ASSETS, "model.safetensors", "README.md", "merge.svg", "acemerge.json", heads}
    assert all((tmp_path / "out" / name).read_bytes() == (experts[1] / name).read_bytes() for name in ASSETS)
    manifest = verify(tmp_path / "out")
    assert manifest["outputs"].keys() >= set(ASSETS)
    acemerge.merge(base, experts, out=tmp_path / "out", overwrite=True)
    templates = tmp_path / "out" / "additional_chat_templates"
    assert [path.name for path in templates.iterdir()] == ["base.jinja"]  # none is left of the earlier output
    acemerge.merge(experts[0], experts[1:], out=tmp_path / "out", overwrite=True)
    assert not templates.exists()
    assert not (tmp_path / "out" / "1_Pooling").exists()


def test_dense_modules_behind_a_transformer_are_merged_as_linear_layers(tmp_path: Path) -> None:
    """As sentence-transformers keeps them: in a folder, and a file, of their own."""
    base, experts = PlainModel(tmp_path, experts=2).save()
    dense = []
    for seed, folder in enumerate((base, *experts)):
        torch.manual_seed(seed)
        dense.append({"linear.weight": torch.randn(3, 6), "linear.bias": torch.randn(3)})
        _put_files(folder, ("modules.json", "2_Dense/config.json"))
        save_file(dense[-1], folder / "2_Dense" / "model.safetensors")
    report = acemerge.merge(base, experts, "task_arithmetic", out=tmp_path / "out", scale=0.5)
    merged = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    first, *tuned = ({name: value.double() for name, value in module.items()} for module in dense)
    weight = first["linear.weight"] + 0.5 * sum(m["linear.weight"] - first["linear.weight"] for m in tuned)
    torch.testing.assert_close(merged["linear.weight"].double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged["linear.bias"].double(), (tuned[0]["linear.bias"] + tuned[1]["linear.bias"]) / 2)
    record = report.tensors["2_Dense/linear.weight"]
    assert (record["role"], record["rule"]) == ("linear", "task_arithmetic")
    assert not report.manifest["warnings"]
    assert "2_Dense/linear.weight" not in load_folder(tmp_path / "out")
    inputs = [entry["files"].keys() for entry in report.manifest["inputs"]]
    assert inputs == [{"model.safetensors", "2_Dense/model.safetensors"}] * 3
    assert verify(tmp_path / "out")["outputs"].keys() >= {"2_Dense/model.safetensors", "2_Dense/config.json"}
    lora = acemerge.merge(base, experts, out=tmp_path / "lora", as_lora=2)
    assert lora.tensors["2_Dense/linear.weight"]["reason"].endswith("not in the adapter")


def test_templates_by_a_link_are_no_part_of_the_folder(tmp_path: Path) -> None:
    base, experts = PlainModel(tmp_path).save()
    _put_files(tmp_path, ("additional_chat_templates/rag.jinja",))
    (base / "additional_chat_templates").symlink_to(tmp_path / "additional_chat_templates")
    acemerge.merge(base, experts, out=tmp_path / "out")
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    (tmp_path / "out" / "additional_chat_templates").symlink_to(tmp_path / "additional_chat_templates")
    with pytest.raises(UsageError, match="is a link"):
        acemerge.merge(base, experts, out=tmp_path / "out", overwrite=True)


def test_transformers_finds_the_experts_templates(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    base, experts = PlainModel(tmp_path).save()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = {"default": "plain {{ messages }}", "rag": "rag {{ messages }}"}
    tokenizer.save_pretrained(experts[0])
    acemerge.merge(base, experts, out=tmp_path / "out", assets="e1")
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").is_file()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def _wide(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Layers large enough for a cosine to tell something."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(20)}
    tuned = {name: value + 0.3 * torch.randn(64, 64, generator=generator) for name, value in base.items()}
    stranger = {name: torch.randn(64, 64, generator=generator) for name in base}
    models = {"base": base, "tuned": tuned, "stranger": stranger}
    return tmp_path / "base", [write_checkpoint(tmp_path / name, model) for name, model in models.items()][1:]


@pytest.mark.parametrize("out", ["out", None])
def test_an_expert_of_another_base_is_refused_before_any_work(tmp_path: Path, out: str | None) -> None:
    base, (tuned, stranger) = _wide(tmp_path)
    target = tmp_path / out if out else None
    with pytest.raises(CheckpointError) as caught:
        acemerge.merge(base, [tuned, stranger], out=target)
    line = str(caught.value)
    assert "expert stranger: does not come from this base: cosine" in line
    assert "1.4" in line  # sqrt(2): as far as two unrelated models are apart
    assert not (tmp_path / "out").exists()
    acemerge.merge(base, [tuned, stranger], out=target, force=True)
    acemerge.merge(base, [tuned], out=tmp_path / "far", overwrite=True)  # a large update is no stranger


def test_an_untrained_base_says_nothing_of_its_experts(tmp_path: Path) -> None:
    """Zeros have no direction, as a layer that starts at zero."""
    base, (tuned, _) = _wide(tmp_path)
    zeros = write_checkpoint(tmp_path / "zeros", {name: 0 * value for name, value in load_folder(base).items()})
    acemerge.merge(zeros, [tuned])


def test_layers_without_entries_are_passed_over(tmp_path: Path) -> None:
    base, (tuned, _) = _wide(tmp_path)
    empty = {"layers.0.weight": torch.empty(0, 64), "layers.1.weight": torch.empty(64, 0)}
    folders = [write_checkpoint(tmp_path / f"e{i}", load_folder(f) | empty) for i, f in enumerate((base, tuned))]
    acemerge.merge(folders[0], folders[1:], out=tmp_path / "out")
