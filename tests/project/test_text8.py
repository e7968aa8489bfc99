"""The examples of the text8 benchmark: nothing that is held out may have been seen."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "text8"))

from intervals import interval, shares
from tasks import Example, _key, _swapped, chosen, split


def test_one_text_comes_once_and_under_one_label() -> None:
    twice = [Example("A text.", "x"), Example("a  text", "x")]
    both = [Example("unclear", "x"), Example("Unclear!", "y")]
    pairs = [Example("dog", "x", pair="animal"), Example("dog", "x", pair="canine")]
    found = {(example.text, example.pair) for example in chosen([*twice, *both, *pairs], None)}
    assert found == {("A text.", None), ("dog", "animal"), ("dog", "canine")}


def test_no_label_has_more_examples_than_asked_for() -> None:
    examples = chosen([Example(str(i), "xy"[i % 2]) for i in range(40)], 7)
    assert [sum(e.label == label for e in examples) for label in "xy"] == [7, 7]


@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_held_out_was_not_seen(grouped: bool) -> None:
    examples = [Example(f"text {i}", "x", group=f"d{i % 60}" if grouped else None) for i in range(600)]
    if grouped:
        examples += [Example(f"TEXT {i}", "x", group="d0") for i in range(600)]  # in many documents at once
    train, test = split(examples)
    assert len(test) >= 90
    assert not {_key(e) for e in train} & {_key(e) for e in test}
    if grouped:
        assert not {e.group for e in train} & {e.group for e in test}
    assert (train, test) == split(examples)


def test_a_swap_exchanges_two_different_words_at_most_three_apart() -> None:
    rng = random.Random(0)
    words = ["the", "cat", ",", "the", "dog", "and", "the", "cow", "."]
    for _ in range(200):
        swapped = _swapped(words, rng)
        assert swapped is not None
        moved = [i for i, (a, b) in enumerate(zip(words, swapped, strict=True)) if a != b]
        assert len(moved) == 2
        assert moved[1] - moved[0] <= 3
        assert sorted(swapped) == sorted(words)
        assert all(words[i].isalpha() for i in moved)
    assert _swapped(["the", "the", "."], rng) is None


def test_the_bootstrap_draws_the_same_examples_for_a_model_and_its_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = {"a": torch.rand(400, generator=generator) < 0.8, "b": torch.rand(100, generator=generator) < 0.6}
    assert shares(expert, expert).eq(1).all()
    worse = {task: right & (torch.rand(len(right), generator=generator) < 0.9) for task, right in expert.items()}
    low, high = interval(shares(worse, expert))
    kept = sum(worse[task].sum() / expert[task].sum() for task in expert) / 2
    assert low < kept < high
    assert 0.04 < high - low < 0.16  # two standard errors each way are 0.08: sqrt(0.9 * 0.1 / rights), over both
