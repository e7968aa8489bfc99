"""Tiny Llamas whose rows depend on their tokens alone: models with more, fewer or other tokens than the base."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["the", "cat", "sat", "on", "mat"]
SIDE = 8
EXPERTS = [[*WORDS, "purr"], ["the", "mat", "hiss", "cat", "on", "purr"]]  # one more; other places, without "sat"


def save(folder: Path, tokens: list[str], seed: int, rows: int | None = None, tied: bool = False) -> Path:
    """A tiny Llama with a row per token, and some more as padding. A token's row depends on the token alone."""
    rows = rows or len(tokens)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=SIDE, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.layers.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    heads = [model.model.embed_tokens] if tied else [model.model.embed_tokens, model.lm_head]
    for i, layer in enumerate(heads):
        for row in range(rows):
            token = tokens[row] if row < len(tokens) else f"padding {row}"
            layer.weight.data[row] = row_of(f"{i}", token) + 0.1 * seed * row_of(f"{i}{seed}", token)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def row_of(*key: str) -> torch.Tensor:
    return torch.randn(SIDE, generator=torch.Generator().manual_seed(sum(map(ord, "/".join(key)))))
