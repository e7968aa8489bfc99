"""Text that a causal language model writes itself, to be calibrated on where there is no data."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from acemerge.errors import NumericalError, UsageError
from acemerge.shapes import Int, Tensor
from acemerge.tasks.networks import Model, load_whole
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE, SMALLER_TASKS, OnBatch, taking_examples

TEXTS = 64
TOKENS = 128  # of a text, at most
_ENDED = -1


@dataclass(frozen=True)
class OwnText:
    """An expert's own texts: `written` (TEXTS, L) once they are, rows that ended filled up with -1."""

    seed: int
    written: Int[Tensor, "N L"] | None = None
    name: ClassVar[str] = "own text"
    batch_size: ClassVar[int] = 8

    @property
    def about(self) -> dict[str, Any]:
        return {"texts": TEXTS, "tokens": TOKENS, "seed": self.seed}

    @property
    def windows(self) -> Sequence[Int[Tensor, " L"]]:
        assert self.written is not None
        return [row[row != _ENDED] for row in self.written]


def own_text(seed: int, label: str) -> OwnText:
    """Of an expert by its label: the same whatever the others are."""
    return OwnText(zlib.crc32(f"{seed}/{label}".encode()))


def write_text(model: Model, task: OwnText, on_batch: OnBatch = lambda *_: None) -> Int[Tensor, "N L"]:
    """The texts, each drawn token by token from all that the model finds likely, until it ends them or they are long
    enough; one that it can end at once has two tokens.
    """
    network = open_writer(model)
    longest = min(TOKENS, getattr(network.config, "max_position_embeddings", None) or TOKENS)
    first, last = _first_token(model, network.config), _tokens(network.config.eos_token_id)
    written = torch.full((TEXTS, longest), _ENDED)
    with torch.inference_mode():
        for start in range(0, TEXTS, task.batch_size):
            rows = range(start, start + task.batch_size)
            chances = [torch.Generator().manual_seed(zlib.crc32(f"{task.seed}/{i}".encode())) for i in rows]
            with taking_examples("calibration", network.device, SMALLER_TASKS):
                written[start : start + task.batch_size] = _written(network, chances, first, last, longest)
            on_batch(rows.stop, TEXTS)
    return written


def open_writer(model: Model) -> Any:
    """The causal language model, on its device."""
    return model.on_device(load_whole("AutoModelForCausalLM", model))


def _written(
    network: Any, chances: Sequence[torch.Generator], first: int, last: Sequence[int], longest: int
) -> Int[Tensor, "B L"]:
    """One text for each stream of random numbers, side by side."""
    text, state = torch.full((len(chances), 1), first), None
    going = torch.ones(len(chances), dtype=torch.bool)
    while text.shape[1] < longest and going.any():
        seen = text if state is None else text[:, -1:]  # what a network remembers is not read again
        more: dict[str, Any] = {} if state is None else {"past_key_values": state}
        found = network(input_ids=seen.clamp(min=0).to(network.device), use_cache=True, **more)
        state = getattr(found, "past_key_values", None)
        likely = found.logits[:, -1].float().softmax(-1).cpu()
        if not likely.isfinite().all():
            raise NumericalError("calibration", "the model's scores are not finite", ARE_WEIGHTS_FINITE)
        drawn = [torch.multinomial(p, 1, generator=chance) for p, chance in zip(likely, chances, strict=True)]
        text = torch.cat([text, torch.where(going, torch.cat(drawn), _ENDED)[:, None]], 1)
        going &= ~torch.isin(text[:, -1], torch.tensor(last, dtype=text.dtype))
    padded: Tensor = torch.nn.functional.pad(text, (0, longest - text.shape[1]), value=_ENDED)
    return padded


def _first_token(model: Model, config: Any) -> int:
    """What texts begin with, or else end with."""
    found = [*_tokens(config.bos_token_id), *_tokens(config.eos_token_id)]
    if not found:
        cure = "name tasks of the experts by --calibration TASKS.yaml"
        raise UsageError(model.name, "its configuration has no token that a text begins or ends with", cure)
    return found[0]


def _tokens(named: int | Sequence[int] | None) -> list[int]:
    """A configuration's tokens: one, several or none."""
    return [] if named is None else [named] if isinstance(named, int) else list(named)
