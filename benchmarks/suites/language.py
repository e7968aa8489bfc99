"""Language: a small causal model of bytes, and an expert for each of six kinds of text."""

from __future__ import annotations

import functools
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packages import BROWN, FORTUNES, SPAM_ASSASSIN, WORDNET, default_cache, unpacked
from suite import Outcome, Prepared, trained
from torch import Tensor, nn
from training import fit

DOMAINS = ("python", "headers", "dictionary", "spam", "fiction", "fortunes")
_CONTEXT = 128
_BATCH = 12
_HELD_OUT = 120  # windows of each domain
_MOST = 4_000_000  # bytes of a domain
_VERSION = 1


@dataclass(frozen=True)
class Kind:
    """`rank`: of experts by LoRA on every linear layer; 0 for all weights. Their first factors are the same, or each
    expert's own where `apart`.
    """

    domains: tuple[str, ...] = DOMAINS
    rank: int = 0
    apart: bool = False
    optimiser: str = "adam"
    rate: float = 5e-4
    steps: int = 200


def prepare(cache: Path, kind: Kind) -> Prepared:
    base = base_model(cache)
    experts = {name: _expert(cache, base, name, kind) for name in kind.domains}
    held = {name: _windows(text_of(name)[1], _HELD_OUT, torch.Generator().manual_seed(5)) for name in kind.domains}

    def outcome(model: nn.Module) -> Outcome:
        return {name: _likelihoods(model, windows) for name, windows in held.items()}

    alone = {name: _likelihoods(experts[name], held[name]) for name in kind.domains}
    return Prepared(base, experts, outcome, alone, likelihood=True)


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=160, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=_CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def base_model(cache: Path) -> Any:
    about = {"what": "language base", "version": _VERSION}
    return trained(
        cache, about, _model, lambda m: _learn(m, text_of("base")[0], 1200, 2e-3, "adam", 0, "language base")
    )


def _expert(cache: Path, base: nn.Module, name: str, kind: Kind) -> Any:
    about = {"what": "language expert", "version": _VERSION, "domain": name, "rank": kind.rank}
    about |= {"optimiser": kind.optimiser, "rate": kind.rate, "steps": kind.steps}
    about |= {"apart": True} if kind.apart else {}

    def make() -> Any:
        model = _model()
        model.load_state_dict(base.state_dict())
        return model

    def train(model: Any) -> None:
        text, seed = text_of(name)[0], 1 + DOMAINS.index(name)
        if not kind.rank:
            _learn(model, text, kind.steps, kind.rate, kind.optimiser, seed, f"{kind.optimiser} {name}")
            return
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed if kind.apart else 0)
        adapted = get_peft_model(model, LoraConfig(r=kind.rank, lora_alpha=2 * kind.rank, target_modules="all-linear"))
        _learn(adapted, text, kind.steps, 10 * kind.rate, kind.optimiser, seed, f"LoRA {name}")
        merged = adapted.merge_and_unload().state_dict()
        model.load_state_dict({n.replace(".base_layer", ""): v for n, v in merged.items()})

    return trained(cache, about, make, train)


def _learn(model: Any, text: Tensor, steps: int, rate: float, optimiser: str, seed: int, what: str) -> None:
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        windows = _windows(text, _BATCH, generator)
        found: Tensor = model(input_ids=windows, labels=windows).loss
        return found

    fit(model, loss, steps, rate, optimiser, what)


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - _CONTEXT, (count,), generator=generator)
    return torch.stack([text[start : start + _CONTEXT] for start in starts.tolist()]).long()


@torch.no_grad()
def _likelihoods(model: Any, windows: Tensor) -> Tensor:
    """The mean log likelihood of a byte in each window, (windows,)."""
    logits = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, windows[:, 1:, None]).squeeze(-1).mean(1)


@functools.cache
def text_of(domain: str) -> tuple[Tensor, Tensor]:
    """The domain's bytes for training, and the last tenth of its files, held out."""
    files = list(_texts(domain))
    cut = len(files) * 9 // 10
    return _bytes(files[:cut]), _bytes(files[cut:])


def _bytes(texts: Iterable[str]) -> Tensor:
    joined = "\n".join(texts).encode("ascii", "replace")[:_MOST]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def _texts(domain: str) -> Iterable[str]:
    cache, library = default_cache(), Path(sysconfig.get_paths()["stdlib"])
    torch_folder = Path(torch.__file__).parent
    if domain == "base":
        return [*_read(library.glob("*.py")), *_brown(cache, "a"), *_mail(cache, "easy-ham-1")[:1200]]
    if domain == "python":
        return _read((torch_folder / "distributed").rglob("*.py"))
    if domain == "headers":
        return _read((torch_folder / "include/ATen").rglob("*.h"))
    if domain == "dictionary":
        return [part for text in _read(unpacked(WORDNET, cache).rglob("data.*")) for part in text.split("\n")[30:]]
    if domain == "spam":
        return _mail(cache, "spam-1")
    if domain == "fiction":
        return _brown(cache, "klnp")
    folder = [unpacked(package, cache) for package in FORTUNES]
    found = [file for root in folder for file in (root / "usr/share/games/fortunes").iterdir() if not file.suffix]
    return [fortune for text in _read(found) for fortune in text.split("\n%\n")]


def _read(paths: Iterable[Path]) -> list[str]:
    return [path.read_text("utf-8", "replace") for path in sorted(paths) if path.is_file()]


def _brown(cache: Path, categories: str) -> list[str]:
    """Texts of these categories, without their tags."""
    files = [p for p in (unpacked(BROWN, cache) / "package").iterdir() if re.fullmatch(rf"c[{categories}]\d\d", p.name)]
    return [re.sub(r"/\S+", "", text) for text in _read(files)]


def _mail(cache: Path, folder: str) -> list[str]:
    return _read((unpacked(SPAM_ASSASSIN, cache) / "package/data" / folder).glob("*.txt"))
