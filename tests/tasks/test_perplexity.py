"""Perplexity: windows, losses, and the whole against one token at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_model
from task_builders import save_model, sentences, sharpened, write_tasks
from torch import Tensor

from acemerge.errors import CheckpointError, UsageError
from acemerge.evaluation.evaluate import Run, evaluate
from acemerge.evaluation.metrics import bootstrap, interval
from acemerge.tasks.perplexity import Losses, text_losses, token_losses, windows
from acemerge.tasks.task_file import load_tasks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "context", "stride"), [(2, 4, 2), (4, 4, 4), (23, 8, 3), (24, 8, 8), (25, 8, 8)])
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(count: int, context: int, stride: int) -> None:
    found = windows(count, context, stride)
    assert [i for w in found for i in range(w.scored, w.end)] == list(range(1, count))
    assert all(w.end - w.begin <= context for w in found)
    assert all(w.scored - w.begin >= max(1, context - stride) for w in found[1:])


def _oracle(model: torch.nn.Module, tokens: Tensor, context: int, stride: int) -> float:
    """Each token's probability by a run of its own over what its window has before it, in float64."""
    total, count = 0.0, 0
    for window in windows(len(tokens), context, stride):
        for i in range(window.scored, window.end):
            logits = model(input_ids=tokens[None, window.begin : i]).logits[0, -1].tolist()
            top = max(logits)
            total += top + math.log(sum(math.exp(x - top) for x in logits)) - logits[int(tokens[i])]
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize(("stride", "batch"), [(3, 1), (4, 3), (8, 2)])
def test_strided_perplexity_is_that_of_one_token_at_a_time(stride: int, batch: int) -> None:
    model = sharpened(make_model("gpt2"), 1).double()
    tokens = torch.randint(3, 40, (21,), generator=torch.Generator().manual_seed(0))
    losses = text_losses(model, tokens, 8, stride, batch, lambda *_: None)
    assert losses.perplexity() == pytest.approx(_oracle(model, tokens, 8, stride), rel=1e-10)
    assert losses.counts.sum() == 20


def test_losses_of_half_precision_logits_are_summed_wide() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(9)
    wide = -torch.log_softmax(logits.double(), -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    assert torch.allclose(token_losses(logits, tokens, 1).double(), wide, atol=1e-5)


def test_the_perplexity_of_a_broken_model_is_a_number() -> None:
    assert Losses(np.array([9000.0]), np.array([3])).perplexity() == pytest.approx(1e307)


def test_the_bootstrap_is_over_windows() -> None:
    losses = Losses(np.array([1.0, 6.0]), np.array([1, 3]))
    draws = bootstrap(losses.perplexity, 2, 400, [0])
    assert {round(value, 6) for value in draws} == {round(math.exp(x), 6) for x in (1.0, 7 / 4, 2.0)}
    assert interval(draws) == (pytest.approx(math.exp(1)), pytest.approx(math.exp(2)))


def test_a_text_file_and_a_column(tmp_path: Path) -> None:
    save_model(tmp_path / "lm", sharpened(make_model("gpt2"), 1))
    lines = sentences(6, seed=3)
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "text.jsonl").write_text("\n".join(f'{{"body": "{line}"}}' for line in lines))
    shape = {"kind": "perplexity", "context": 8, "stride": 4}
    path = write_tasks(
        tmp_path,
        {"name": "file", "data": "text.txt", **shape},
        {"name": "rows", "data": "text.jsonl", "text": "body", **shape},
    )
    (row,) = evaluate({"lm": str(tmp_path / "lm")}, Run(load_tasks(path), CPU)).rows
    file, rows = row.known()
    assert file.score == rows.score > 1
    assert file.about["tokens"] == sum(len(line.split()) for line in lines) + 1  # with [CLS] and [SEP], less the first
    save_model(tmp_path / "half", make_model("gpt2", tie_word_embeddings=False).transformer, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks tensor 'lm_head\.weight'"):
        evaluate({"half": str(tmp_path / "half")}, Run(load_tasks(path), CPU))
    too_long = write_tasks(tmp_path, {"name": "x", "data": "text.txt", "kind": "perplexity", "context": 5000})
    with pytest.raises(UsageError, match="context 5000 is over the model's"):
        evaluate({"lm": str(tmp_path / "lm")}, Run(load_tasks(too_long), CPU))
