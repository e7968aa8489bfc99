"""Patterns of adapters' configurations: what `re` would say, in a time that no file can draw out."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from builders import write_adapter
from hypothesis import given
from hypothesis import strategies as st

from acemerge.checkpoints.lora import open_adapter
from acemerge.checkpoints.patterns import Budget, Pattern, PatternError, PatternTable
from acemerge.errors import CheckpointError
from attacks.harness import Meter


def _larger(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "*?", "{1,3}", "{2}", "{0,1}", "{2,}"])
    return st.one_of(
        st.tuples(part, part).map("".join),
        st.tuples(part, part).map("({0[0]}|{0[1]})".format),
        st.tuples(part, repeats).map("(?:{0[0]}){0[1]}".format),
        part.map("^{}".format),
        part.map("{}$".format),
    )


_CHARACTERS = st.sampled_from(["a", "b", ".", r"\.", "[ab0]", "[^a]", "[a-c_]", r"\d", r"\W", "0", "_", r"\w"])


@given(st.recursive(_CHARACTERS, _larger, max_leaves=6), st.text("ab.0_", max_size=8))
def test_a_pattern_matches_what_re_matches(pattern: str, name: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert Pattern.read(pattern, Budget()).matches(name, Budget()) == expected


ALTERNATIVES = "(" + "|".join("a" * length for length in range(1, 17)) + ")"
HOSTILE = [
    ALTERNATIVES * 4,
    "(a+)+b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*a){12}b",
    "a?" * 60 + "a" * 60 + "b",
    "((a{0,9}){0,9}){0,9}b",
    "(" * 80 + "a" + ")*" * 80 + "b",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_patterns_are_answered_in_a_second(pattern: str, tmp_path: Path) -> None:
    modules = [f"layers.{i}.{'a' * 50}" for i in range(200)]
    factors = {module: (torch.ones(1, 6), torch.ones(8, 1)) for module in modules}
    adapter = write_adapter(tmp_path / "lora", factors, rank_pattern={pattern: 1})
    meter = Meter(1.0, 1 << 30)
    meter.start()
    with contextlib.suppress(CheckpointError):
        open_adapter(adapter)
    assert meter.excess() == ""


def test_many_patterns_for_many_names_are_bounded_together() -> None:
    texts = [f"model.layers.{i}.q_proj" for i in range(500)]
    table = PatternTable(tuple((Pattern.read(text, Budget()), 1.0) for text in texts))
    assert table.find("model.layers.499.q_proj", 0.0) == 1.0
    names, meter = ["lm_head"] * 100_000, Meter(1.0, 1 << 30)
    meter.start()
    with pytest.raises(PatternError, match=r"takes too long to match, at the pattern 'model\.layers\.\d+\.q_proj'"):
        max(table.find(name, 0.0) for name in names)
    assert meter.excess() == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a)\1", "uses groupref"),
        ("(?=a)a", "uses assert"),
        (r"\bq", "uses at"),
        ("(?i)q_proj", "sets flags"),
        ("a{6000}", "is too long"),
        ("(a{100}){100}", "is too long"),
        ("a" * 1001, "is longer than 1000"),
        ("a(", "is no regular expression"),
        (7, "is no pattern"),
    ],
)
def test_what_cannot_be_read_is_named(pattern: object, why: str) -> None:
    with pytest.raises(PatternError, match=why):
        Pattern.read(pattern, Budget())
