"""Tokens and templates with half a surrogate pair, as JSON can hold and UTF-8 cannot."""

from __future__ import annotations

import json

from acemerge.checkpoints.tokenizer import spelled


def test_half_a_character_is_written_as_its_escape() -> None:
    for content in ({"a": "\ud83d"}, {"added_tokens": [{"content": "\udcff"}]}, {"b": "\u2603 and \ud800"}):
        assert json.loads(spelled(content).decode()) == content
    assert spelled({"a": "\u2603"}) == '{\n  "a": "\u2603"\n}\n'.encode()  # people read it otherwise
