"""Experts with more, fewer or other tokens than the base: matched by token, recorded, never cut in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import load_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from vocabularies import EXPERTS, WORDS, save

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.models.vocabulary import match
from acemerge.output.verify import verify


def _mean(word: str, folders: list[Path], vocabularies: list[list[str]], name: str) -> torch.Tensor:
    """The oracle: the token's row in every model that has it, the base first, averaged as updates of the base's."""
    found = [
        load_folder(f)[name][v.index(word)].double() for f, v in zip(folders, vocabularies, strict=True) if word in v
    ]
    if word not in vocabularies[0]:
        return torch.stack(found).mean(0)
    return torch.stack(found[1:]).mean(0) if found[1:] else found[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("policy", ["base", "union"])
def test_rows_are_matched_by_token(tmp_path: Path, policy: str, tied: bool) -> None:
    vocabularies = [WORDS, *EXPERTS]
    folders = [save(tmp_path / f"m{i}", v, i, tied=tied) for i, v in enumerate(vocabularies)]
    report = acemerge.merge(folders[0], folders[1:], out=tmp_path / "out", vocabulary=policy)
    tokens = WORDS if policy == "base" else [*WORDS, "purr", "hiss"]
    merged = load_folder(tmp_path / "out")
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in names:
        expected = torch.stack([_mean(word, folders, vocabularies, name) for word in tokens])
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert f"policy {policy}" in report.tensors[name]["reason"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokens) == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the cat sat on purr")["input_ids"]) == [
        *("the", "cat", "sat", "on"), "purr" if policy == "union" else "the",
    ]  # fmt: skip
    assert torch.isfinite(model(torch.tensor([[0, len(tokens) - 1]])).logits).all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    verify(tmp_path / "out")


def test_a_share_of_the_whole_model_counts_the_lent_rows(tmp_path: Path) -> None:
    """The same as of models that have every token's row already."""
    vocabularies, every = [WORDS, *EXPERTS], [*WORDS, "purr", "hiss"]
    folders = [save(tmp_path / f"m{i}", v, i) for i, v in enumerate(vocabularies)]
    whole = [save(tmp_path / f"whole{i}", every, i) for i in range(len(folders))]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = [dict(zip(v, load_folder(f)[name], strict=True)) for f, v in zip(folders, vocabularies, strict=True)]
        mean = {word: torch.stack([rows[word] for rows in own if word in rows]).mean(0) for word in every}
        for folder, rows in zip(whole, own, strict=True):
            tensors = load_folder(folder) | {name: torch.stack([rows.get(word, mean[word]) for word in every])}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rule: dict[str, Any] = {"method": "ties", "trim": "global", "keep": 0.1, "embeddings": "rule"}
    lent = acemerge.merge(
        folders[0], folders[1:], out=tmp_path / "lent", vocabulary="union", missing_tokens="mean", **rule
    )
    acemerge.merge(whole[0], whole[1:], out=tmp_path / "out", **rule)
    expected = load_folder(tmp_path / "out")
    assert all(lent.tensors["lm_head.weight"]["thresholds"])
    for name, value in load_folder(tmp_path / "lent").items():
        torch.testing.assert_close(value, expected[name])


def test_a_rule_knows_the_base_of_rows_by_token(tmp_path: Path) -> None:
    """It bounds how far they move, as it does where all have one vocabulary."""
    folders = [save(tmp_path / f"m{i}", v, i) for i, v in enumerate([WORDS, *EXPERTS])]
    asked: dict[str, Any] = {"vocabulary": "union", "missing_tokens": "mean", "embeddings": "rule"}
    report = acemerge.merge(folders[0], folders[1:], "kron_auto", tmp_path / "out", **asked)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert report.tensors[name]["rule"] == "kron_auto"
        assert report.tensors[name]["relative_step"] > 0


def test_padded_and_trimmed_embeddings(tmp_path: Path) -> None:
    """Rows without a token are matched by number; what one model lacks is the base's own."""
    folders = [save(tmp_path / "b", WORDS, 0, rows=8), save(tmp_path / "e", WORDS, 1, rows=6)]
    acemerge.merge(folders[0], folders[1:], out=tmp_path / "out", vocabulary="base")
    base, expert, merged = (load_folder(f)["model.embed_tokens.weight"] for f in (*folders, tmp_path / "out"))
    torch.testing.assert_close(merged[:6], expert)
    assert torch.equal(merged[6:], base[6:])


def test_one_vocabulary_needs_no_matching(tmp_path: Path) -> None:
    folders = [save(tmp_path / f"m{i}", WORDS, i) for i in range(3)]
    plain = acemerge.merge(folders[0], folders[1:], out=tmp_path / "plain")
    expected = load_folder(tmp_path / "plain")
    for policy in ("base", "union"):
        acemerge.merge(folders[0], folders[1:], out=tmp_path / policy, vocabulary=policy)
        merged = load_folder(tmp_path / policy)
        assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert not plain.manifest["warnings"]


def test_other_sizes_are_refused_and_other_places_are_warned_of(tmp_path: Path) -> None:
    base, larger = save(tmp_path / "base", WORDS, 0), save(tmp_path / "larger", EXPERTS[0], 1)
    turned = save(tmp_path / "turned", WORDS[::-1], 1)
    with pytest.raises(CheckpointError, match="--vocabulary base or union"):
        acemerge.merge(base, [larger])
    report = acemerge.merge(base, [turned], force=True)
    assert (
        "expert turned: 4 tokens have other ids than in the base; vocabulary: base matches the rows by token"
        in (report.manifest["warnings"])
    )


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    base, larger = save(tmp_path / "base", WORDS, 0), save(tmp_path / "larger", EXPERTS[0], 1)
    rule: dict[str, Any] = {"match": "lm_head.weight", "action": "base"}
    with pytest.raises(UsageError, match=r"lm_head\.weight.*another rule than average"):
        acemerge.merge(base, [larger], vocabulary="union", rules=[rule])
    with pytest.raises(UsageError, match="can only be averaged"):
        acemerge.merge(base, [larger], vocabulary="base", embeddings="rule")
    listed = json.loads((larger / "tokenizer.json").read_text())
    listed["model"]["vocab"]["purr"] = 0
    (larger / "tokenizer.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="two tokens have one id"):
        acemerge.merge(base, [larger], vocabulary="base")
    (larger / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="expert larger: has no list of tokens"):
        acemerge.merge(base, [larger], vocabulary="base")


def test_rows_that_are_not_finite_are_refused_or_their_expert_left_out(tmp_path: Path) -> None:
    vocabularies = [WORDS, *EXPERTS]
    base, *experts = (save(tmp_path / f"m{i}", v, i) for i, v in enumerate(vocabularies))
    name = "model.embed_tokens.weight"
    alone = acemerge.merge(base, experts[:1], out=tmp_path / "alone", vocabulary="base")
    broken = load_folder(experts[1])
    broken[name][2, 3] = float("nan")
    save_file(broken, experts[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert m2: tensor .*embed_tokens.* is nan at \[2, 3\]"):
        acemerge.merge(base, experts, vocabulary="base")
    report = acemerge.merge(base, experts, out=tmp_path / "out", vocabulary="base", nonfinite="skip-expert")
    assert report.tensors[name]["skipped_experts"] == ["m2"]
    assert torch.equal(load_folder(tmp_path / "out")[name], load_folder(tmp_path / "alone")[name])
    assert "skipped_experts" not in alone.tensors[name]
    with pytest.raises(CheckpointError, match="no expert has finite values"):
        acemerge.merge(base, experts[1:], vocabulary="base", nonfinite="skip-expert")


TOKENS = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8)


@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=3), st.integers(0, 3))
def test_every_token_is_found_once(base: list[str], experts: list[list[str]], padding: int) -> None:
    tables = [{token: i for i, token in enumerate(tokens)} for tokens in experts]
    own = {token: i for i, token in enumerate(base)}
    for policy in ("base", "union"):
        found = match(policy, own, len(base) + padding, tables, [len(tokens) for tokens in experts])
        names = {i: token for token, i in (*own.items(), *found.added.items())}
        assert len(names) == len(own) + len(found.added) == len({*own, *found.added})
        assert set(names.values()) == (set(base) if policy == "base" else set(base).union(*experts))
        for tokens, sources in zip(experts, found.sources.tolist(), strict=True):
            rows = [row for row in sources if row >= 0]
            assert len(set(rows)) == len(rows)
            for place, row in enumerate(sources):
                assert row == (tokens.index(names[place]) if names.get(place) in tokens else -1)
