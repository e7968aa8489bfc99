"""What hooks see of a model's inputs against what is computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import make_model
from calibrated_family import examples, moments_of, second_moment
from oracles import relative_error
from task_builders import save_model, sentences, sharpened, write_tasks
from torch import Tensor, nn

from acemerge.calibration.hooks import watching


def test_second_moments_are_those_of_every_token_computed_by_hand(family: Path) -> None:
    """Each text alone: no batch, no padding."""
    from transformers import RobertaForSequenceClassification

    found = moments_of(family, family / "topic", 0)
    network = RobertaForSequenceClassification.from_pretrained(family / "topic")
    layer = network.roberta.encoder.layer[1]
    inputs, attended, inner, heads = [], [], [], []
    with torch.no_grad():
        for example in examples(family, 0):
            states = network.roberta(**example, output_hidden_states=True).hidden_states
            inputs.append(states[1])
            attended.append(layer.attention(states[1])[0])
            inner.append(layer.intermediate(attended[-1]))
            heads.append(states[2][:, 0])
    prefix = "roberta.encoder.layer.1"
    for name, rows in (
        (f"{prefix}.attention.self.query.weight", inputs),
        (f"{prefix}.attention.self.value.weight", inputs),
        (f"{prefix}.intermediate.dense.weight", attended),
        (f"{prefix}.output.dense.weight", inner),
        ("classifier.dense.weight", heads),
    ):
        assert relative_error(found[name], second_moment(rows)) < 1e-5, name
    assert found[f"{prefix}.output.dense.weight"].dtype == torch.float64
    assert not any("embeddings" in name for name in found)


def test_a_conv1d_is_seen_with_its_inputs(tmp_path: Path) -> None:
    save_model(tmp_path / "gpt2", sharpened(make_model("gpt2"), 1))
    (tmp_path / "text.txt").write_text(" ".join(sentences(12, seed=3)))
    write_tasks(tmp_path, {"kind": "perplexity", "name": "lm", "data": "text.txt", "context": 8, "stride": 8})
    found = moments_of(tmp_path, tmp_path / "gpt2", 0)
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokens = AutoTokenizer.from_pretrained(tmp_path / "gpt2")((tmp_path / "text.txt").read_text())["input_ids"]
    network = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").transformer
    rows = []
    with torch.no_grad():
        for window in torch.tensor(tokens).split(8):
            states = network(input_ids=window[None], output_hidden_states=True).hidden_states
            rows.append(network.h[1].ln_1(states[1]))
    assert relative_error(found["transformer.h.1.attn.c_attn.weight"], second_moment(rows)) < 1e-5
    assert found["transformer.h.1.mlp.c_proj.weight"].shape == (64, 64)  # stored (64, 16): its inputs are the rows


@pytest.mark.parametrize("family_name", ["qwen3_moe", "gpt_oss"])  # apart on disk, and one stack
def test_fused_experts_are_seen_with_the_tokens_sent_to_each(family_name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", sharpened(make_model(family_name), 1))
    (tmp_path / "text.txt").write_text(" ".join(sentences(12, seed=3)))
    write_tasks(tmp_path, {"kind": "perplexity", "name": "lm", "data": "text.txt", "context": 8, "stride": 8})
    found = moments_of(tmp_path, model, 0)
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    fused = next(m for _, m in network.named_modules() if type(m).__name__.endswith("Experts"))
    sent: list[list[Tensor]] = [[] for _ in range(fused.num_experts)]

    def route(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tokens, *routing = (*args, *kwargs.values())
        for i, rows in enumerate(sent):
            rows.append(tokens[(routing[0] == i).any(-1)])

    fused.register_forward_pre_hook(route, with_kwargs=True)
    ids = transformers.AutoTokenizer.from_pretrained(model)((tmp_path / "text.txt").read_text())["input_ids"]
    with torch.no_grad():
        for window in torch.tensor(ids).split(8):
            network(input_ids=window[None])
    expected = [second_moment(rows) if sum(map(len, rows)) else torch.zeros(16, 16) for rows in sent]
    names = [name for name in found if "layers.0." in name and "gate" in name and "experts" in name]
    seen = [found[name] for name in sorted(names)]
    if len(seen) == 1:  # one stack on disk, too
        (seen,) = seen
    assert len(seen) == fused.num_experts
    for own, computed in zip(seen, expected, strict=True):
        assert relative_error(own, computed) < 1e-5


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class _Odd(nn.Module):
    """A linear layer, weights that are used but not as one, and stacked weights in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.added, self.stacked = nn.Linear(3, 3), nn.Linear(3, 3), _Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.stacked((self.plain(x) + x @ self.added.weight).view(2, 1, 3))


def test_a_weight_that_is_used_in_another_way_is_not_seen() -> None:
    network, seen = _Odd(), []
    parameters = {f"{name}.weight" for name in ("plain", "added", "stacked")}
    with watching(network, parameters, lambda layer, x: seen.append((layer, tuple(x.shape)))):
        network(torch.ones(2, 3))
    network(torch.ones(2, 3))
    assert seen == [(("plain.weight", 0), (2, 3)), (("stacked.weight", 0), (1, 3)), (("stacked.weight", 1), (1, 3))]
