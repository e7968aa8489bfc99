"""What only experts' tokenizers have: said by name before anything is merged, with cures that work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import PlainModel, load_folder
from commands import run

import acemerge

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _files(folder: Path, tokens: list[str], eos: str, eos_id: Any, template: str | None = None) -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    settings = {"eos_token": eos} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_id}))


@pytest.fixture
def chat(plain: PlainModel) -> tuple[Path, list[Path]]:
    """A base that only goes on with a text, two experts that chat, and one that is as the base."""
    base, experts = plain.save()
    words = [f"w{i}" for i in range(9)]
    _files(base, [*words, "</s>"], "</s>", 9)
    for expert in experts[:2]:
        _files(expert, [*words, "</s>", "<|end|>"], "<|end|>", [9, 10], TEMPLATE)
    _files(experts[2], [*words, "</s>"], "</s>", 9)
    return base, experts


def test_each_loss_is_named_with_its_cure(chat: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = chat
    notes = acemerge.merge(base, experts, "average").manifest["warnings"]
    assert notes == [
        "experts e1, e2 have a chat template, which the output lacks; `chat_template: auto` writes the commonest, "
        "`assets: e1` takes that one's files",
        "the output's eos_token is '</s>', that of experts e1, e2 '<|end|>': it may not end where they do; "
        "`assets: e1` takes that one's files",
        "the output's eos_token_id is 9, that of experts e1, e2 [9, 10]: it may not end where they do; "
        "`assets: e1` takes that one's files",
        "experts e1, e2 have tokens that the output's tokenizer lacks, as '<|end|>'; `assets: e1` takes that one's "
        "files, `vocabulary: union` adds them all",
    ]
    words = [word for expert in experts for word in ("--expert", expert)]
    code, said, _ = run(capsys, "plan", "--base", base, *words)
    assert code == 0
    assert all(note in " ".join(said.split()) for note in notes)


def test_the_cures_cure(chat: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = chat
    notes = acemerge.merge(base, experts, "average", tmp_path / "auto", chat_template="auto").manifest["warnings"]
    assert not any("template" in note for note in notes)
    assert json.loads((tmp_path / "auto/tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert acemerge.merge(base, experts, "average", tmp_path / "out", assets="e1").manifest["warnings"] == []
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": [9, 10]}


@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_with_tokens_matched_the_files_are_taken_with_their_rows(
    vocabulary: str, chat: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = chat
    notes = acemerge.merge(base, experts, "average", vocabulary=vocabulary).manifest["warnings"]
    keys = {"assets": "e1", "vocabulary": "assets", "missing_tokens": "mean"}
    one, *others = (f"`{key}: {value}`" for key, value in keys.items())
    cure = f"{one} with {' and '.join(others)} takes that one's files"
    assert [cure in note for note in notes] == [True] * (4 if vocabulary == "base" else 3)
    assert acemerge.merge(base, experts, "average", tmp_path / "out", **keys).manifest["warnings"] == []
    assert len(load_folder(tmp_path / "out")["embed_tokens.weight"]) == 11


def test_where_all_have_the_same_nothing_is_said(plain: PlainModel) -> None:
    base, experts = plain.save()
    for folder in (base, *experts):
        _files(folder, ["a", "b"], "b", 1, TEMPLATE)
    assert acemerge.merge(base, experts, "average").manifest["warnings"] == []


def test_a_damaged_file_of_an_expert_is_not_read_for_a_warning(chat: tuple[Path, list[Path]]) -> None:
    base, experts = chat
    (experts[0] / "tokenizer_config.json").write_text("{")
    notes = acemerge.merge(base, experts, "average").manifest["warnings"]
    assert notes[0].startswith("expert e2 has a chat template")
