"""mergekit recipes that say whose tokens the output has: against a slow oracle, and against mergekit itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from builders import load_folder, write_checkpoint
from mergekit_shelf import LLAMA, beside_mergekit, by_mergekit, layers_of, llama_tensors, merged, model, stack
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.verify import verify
from acemerge.recipes.recipe import load_recipe, make_recipe

WORDS = {
    "base": ["the", "cat", "sat", "on", "mat"],
    "a": ["the", "cat", "sat", "on", "mat", "purr"],
    "b": ["the", "mat", "hiss", "cat", "on", "purr"],
    "c": ["on", "the", "hiss", "cat"],
}
PER_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llamas `base`, `a`, ... with vocabularies of their own."""
    root, generator = tmp_path_factory.mktemp("shelf"), torch.Generator().manual_seed(1)
    for name, words in WORDS.items():
        tensors = {n: v + 0.02 * torch.randn(v.shape, generator=generator) for n, v in llama_tensors().items()}
        tensors |= {n: 0.3 * torch.randn(len(words), 16, generator=generator) for n in PER_TOKEN}
        write_checkpoint(root / name, tensors, LLAMA | {"vocab_size": len(words), "torch_dtype": "float32"})
        save_tokenizer(root / name, words)
    return root


def save_tokenizer(folder: Path, words: list[str], *special: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*special])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def recipe(method: str, *names: str, base: str | None = None, **more: Any) -> dict[str, Any]:
    """The models with the weights 1, 2, ..."""
    listed = [model(name, weight=i) for i, name in enumerate(names, 1)]
    return {"merge_method": method, "models": listed, "base_model": base, **more}


def words_of(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return vocabulary


def with_all(shelf: Path, names: list[str], tensor: str, word: str, base: str | None) -> dict[str, Tensor]:
    """The oracle: a word's row in every model; in one that lacks it the base's, or the mean of those that have it."""
    rows = {name: load_folder(shelf / name)[tensor].double() for name in names}
    having = {name: rows[name][WORDS[name].index(word)] for name in names if word in WORDS[name]}
    lent = having[base] if base in having else sum(having.values()) / max(1, len(having))
    return {name: having.get(name, lent) for name in names}


def test_union_lends_what_a_model_lacks(shelf: Path) -> None:
    names = ["base", "a", "b", "c"]
    found = merged(shelf, recipe("task_arithmetic", "a", "b", "c", base="base", tokenizer_source="union"), "union")
    own = words_of(shelf / "union")
    assert own == {word: i for i, word in enumerate([*WORDS["base"], "purr", "hiss"])}
    for tensor in PER_TOKEN:
        for word, row in own.items():
            W = with_all(shelf, names, tensor, word, "base")
            expected = W["base"] + sum(i * (W[name] - W["base"]) for i, name in enumerate("abc", 1))
            torch.testing.assert_close(found[tensor][row].double(), expected, rtol=0, atol=1e-6, msg=f"{tensor} {word}")
    assert json.loads((shelf / "union" / "config.json").read_text())["vocab_size"] == 7
    report = verify(shelf / "union")
    assert "policy union: 7 rows, 2 added; experts have [6, 6, 4]" in report["tensors"]["lm_head.weight"]["reason"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(shelf / "union")
    assert loaded(torch.tensor([[0, 6]])).logits.isfinite().all()


def test_without_a_base_the_mean_is_lent(shelf: Path) -> None:
    """`cat` is in all, `sat` in one, `hiss` in two: they lend their mean, whatever their weights."""
    found = merged(shelf, recipe("linear", "a", "b", "c", tokenizer_source="b"), "of-b")
    assert words_of(shelf / "of-b") == {word: i for i, word in enumerate(WORDS["b"])}
    for tensor in PER_TOKEN:
        for row, word in enumerate(WORDS["b"]):
            W = with_all(shelf, ["a", "b", "c"], tensor, word, None)
            expected = (W["a"] + 2 * W["b"] + 3 * W["c"]) / 6
            torch.testing.assert_close(found[tensor][row].double(), expected, rtol=0, atol=1e-6, msg=f"{tensor} {word}")


def test_a_token_that_nobody_has_is_zeros(shelf: Path) -> None:
    """`purr` and `hiss` are in the tokenizer of a model that is no part of the first slice's embedding."""
    slices = [[layers_of("base")(0, 2)], [layers_of("b")(2, 4)]]
    found = merged(shelf, stack("passthrough", *slices) | {"tokenizer_source": "b"}, "zeros")
    embedding, head = (found[name] for name in PER_TOKEN)
    own = load_folder(shelf / "base")["model.embed_tokens.weight"]
    assert not embedding[[2, 5]].any()
    assert torch.equal(embedding[[0, 1, 3, 4]], own[[0, 4, 1, 3]])
    assert torch.equal(head, load_folder(shelf / "b")["lm_head.weight"])


def test_one_vocabulary_is_left_as_it_is(shelf: Path) -> None:
    plain = merged(shelf, recipe("linear", "a", "a"), "plain")
    same = merged(shelf, recipe("linear", "a", "a", tokenizer={"source": "union"}), "same")
    assert all(torch.equal(value, same[name]) for name, value in plain.items())


def test_an_added_token_stays_as_special_as_it_was(shelf: Path) -> None:
    special = shelf / "special"
    write_checkpoint(special, load_folder(shelf / "a"), json.loads((shelf / "a" / "config.json").read_text()))
    save_tokenizer(special, WORDS["a"][:5], "purr")
    merged(shelf, recipe("task_arithmetic", "special", base="base", tokenizer_source="union"), "kept")
    made = transformers.AutoTokenizer.from_pretrained(shelf / "kept")
    assert made.decode(made("the purr cat")["input_ids"], skip_special_tokens=True).split() == ["the", "cat"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokenizer_source": "d"}, "the tokenizer's source 'd' is none of the models; use base, union or one"),
        (
            {"tokenizer_source": "union", "tokenizer": {"source": "union"}},
            "has both `tokenizer` and `tokenizer_source`",
        ),
        ({"tokenizer": {"tokens": {"purr": {"source": "a"}}}}, "tokenizer: `tokens` is not supported yet"),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "tokenizer: `pad_to_multiple_of` is not supported yet"),
        ({"tokenizer": {"sauce": "union"}}, "tokenizer: unknown key 'sauce'; did you mean `source`?"),
        ({"tokenizer": "union"}, "tokenizer: not a table"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shelf: Path, more: dict[str, Any], said: str) -> None:
    (shelf / "wrong.yml").write_text(yaml.safe_dump(recipe("linear", "a", "b", **more)))
    with pytest.raises(UsageError) as failure:
        load_recipe(shelf / "wrong.yml", {})
    assert said in str(failure.value)


def test_keys_that_do_not_go_together_are_refused(shelf: Path) -> None:
    two = {"base": str(shelf / "base"), "experts": [str(shelf / "a")]}
    for more, said in (
        ({"vocabulary": "assets"}, "no row may be missing"),
        ({"missing_tokens": "base"}, "goes with a vocabulary"),
        ({"vocabulary": "union", "missing_tokens": "mean", "nonfinite": "skip-expert"}, "cannot be skipped"),
    ):
        with pytest.raises(UsageError, match=said):
            make_recipe(two | more)
    (shelf / "silent").mkdir()
    write_checkpoint(shelf / "silent", load_folder(shelf / "a"), json.loads((shelf / "a" / "config.json").read_text()))
    silent = make_recipe({"base": str(shelf / "silent"), "experts": [str(shelf / "b")], "vocabulary": "union"} | MEAN)
    with pytest.raises(CheckpointError, match="base: has no list of tokens"):
        open_recipe(silent, None, RunOptions())


FIRST, SECOND = ("{% for m in messages %}" + f"{{{{ m.content }}}}{end}" + "{% endfor %}" for end in ("!", "?"))


@pytest.mark.parametrize(("asked", "given"), [(FIRST, FIRST), ("auto", SECOND), (None, FIRST)])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_is_that_of_the_recipe_or_of_most_models(
    shelf: Path, tmp_path: Path, asked: str | None, given: str, where: str
) -> None:
    """The base's is the first, two experts' the second."""
    for name, template in {"base": FIRST, "a": SECOND, "b": SECOND + "\n"}.items():
        write_checkpoint(tmp_path / name, load_folder(shelf / "base"), {**LLAMA, "vocab_size": 5})
        save_tokenizer(tmp_path / name, WORDS["base"])
        if where == "chat_template.jinja":
            (tmp_path / name / where).write_text(template)
        else:
            settings = json.loads((tmp_path / name / where).read_text()) | {"chat_template": template}
            (tmp_path / name / where).write_text(json.dumps(settings))
    merged(tmp_path, recipe("linear", "a", "b", base="base", parameters={"weight": 1}, chat_template=asked), "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == given
    verify(tmp_path / "out")


def test_a_template_is_a_file_of_its_own_where_there_are_no_settings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"layers.0.w.weight": torch.ones(2, 2)}, {})
    merged(tmp_path, recipe("linear", "a", chat_template=FIRST), "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == FIRST
    merged(tmp_path, recipe("linear", "a", chat_template="auto"), "none")
    assert not (tmp_path / "none" / "chat_template.jinja").exists()


MEAN = {"missing_tokens": "mean"}
a, b = layers_of("a"), layers_of("b")
CASES = {
    "union-linear": recipe("linear", "a", "b", "c", tokenizer_source="union"),
    "model-linear": recipe("linear", "a", "b", "c", tokenizer_source="c"),
    "base-linear": recipe("linear", "a", "b", "base", base="base", tokenizer_source="base"),
    "union-arithmetic": recipe("task_arithmetic", "a", "b", "c", base="base", tokenizer={"source": "union"}),
    "model-ties": recipe("ties", "a", "b", base="base", parameters={"density": 0.5}, tokenizer={"source": "b"}),
    "union-slices": stack("linear", [a(0, 1), b(0, 1, weight=0)], [a(1, 3)], [b(3, 4), a(3, 4, weight=0)], weight=1)
    | {"tokenizer_source": "union"},
}


@pytest.fixture(scope="module")
def theirs(shelf: Path) -> Path:
    by_mergekit(shelf, CASES)
    return shelf


@beside_mergekit
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_their_rows_are_those_of_mergekit(theirs: Path, name: str) -> None:
    expected, found = load_folder(theirs / f"theirs-{name}"), merged(theirs, CASES[name], f"ours-{name}")
    words, ours = (words_of(theirs / f"{who}-{name}") for who in ("theirs", "ours"))
    assert words.keys() == ours.keys()  # in mergekit the rows of added ones are in any order
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        own = found[key]
        if key in PER_TOKEN:
            assert own.shape == value.shape
            own, value = (x[[vocabulary[word] for word in words]] for x, vocabulary in ((own, ours), (value, words)))
        assert (own - value).abs().max() <= 1e-6, key
