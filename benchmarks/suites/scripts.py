"""Vision: a small vision transformer that knows signs, and an expert for the letters of each script."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from glyphs import SCRIPTS, SIGNS, Letters, batch, letters
from suite import Outcome, Prepared, trained
from torch import Tensor, nn
from training import fit

_WIDTH = 96
_LAYERS = 4
_HELD_OUT = 600
_BATCH = 64
_BASE_STEPS = 5000
_VERSION = 3


@dataclass(frozen=True)
class Kind:
    """How the experts of a suite come about. `bad`: a script whose expert learns labels by chance. `shared`: so many
    steps that all experts have in common, on signs that the base did not see.
    """

    scripts: tuple[str, ...] = tuple(SCRIPTS)
    optimiser: str = "adam"
    rate: float = 1e-3
    steps: int = 300
    bad: str = ""
    shared: int = 0
    seed: int = 0


class Body(nn.Module):
    """A few strided convolutions, then transformer layers on the 16 places that are left; the mean of these."""

    def __init__(self) -> None:
        from transformers import ViTConfig
        from transformers.models.vit.modeling_vit import ViTLayer

        super().__init__()
        config = ViTConfig(
            hidden_size=_WIDTH, num_attention_heads=4, intermediate_size=3 * _WIDTH, attn_implementation="sdpa"
        )
        sizes = (1, _WIDTH // 4, _WIDTH // 2, _WIDTH)
        convolutions = [nn.Conv2d(m, n, 3, 2, 1) for m, n in itertools.pairwise(sizes)]
        self.stem = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1], nn.GELU(), convolutions[2])
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, _WIDTH))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        mean: Tensor = self.norm(hidden).mean(1)
        return mean


class Classifier(nn.Module):
    """A body with a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images))
        return scores


def prepare(cache: Path, kind: Kind) -> Prepared:
    torch.manual_seed(kind.seed)
    base = base_model(cache)
    start = _start(cache, base, kind)
    experts = {name: _expert(cache, start, name, kind) for name in kind.scripts}
    held = {name: _held_out(letters(SCRIPTS[name])) for name in kind.scripts}
    scored = {name: held[name] for name in kind.scripts if name != kind.bad}

    @torch.no_grad()
    def outcome(body: nn.Module) -> Outcome:
        return {name: _hits(body, experts[name].head, *examples) for name, examples in scored.items()}

    bodies = {name: expert.body for name, expert in experts.items()}
    alone = {name: _hits(experts[name].body, experts[name].head, *examples) for name, examples in scored.items()}
    return Prepared(base.body, bodies, outcome, alone)


def base_model(cache: Path) -> Classifier:
    signs = letters(*SIGNS.values())
    about = {"what": "scripts base", "version": _VERSION, "steps": _BASE_STEPS}
    return trained(
        cache, about, lambda: Classifier(signs.count), lambda m: _learn(m, signs, _BASE_STEPS, 3e-3, "adam", 0, "base")
    )


def _start(cache: Path, base: Classifier, kind: Kind) -> Classifier:
    """What the experts are tuned from: the base, or where they share something the base tuned for that."""
    if not kind.shared:
        return base
    common = letters((0x2701, 0x27BF), (0x1500, 0x1676))
    about = {"what": "scripts shared", "version": _VERSION, "steps": kind.shared, "rate": kind.rate}

    def make() -> Classifier:
        return _like(base, common.count)

    return trained(
        cache, about, make, lambda m: _learn(m, common, kind.shared, kind.rate, "adam", 99, "shared component")
    )


def _expert(cache: Path, start: Classifier, name: str, kind: Kind) -> Classifier:
    own = letters(SCRIPTS[name])
    if name == kind.bad:
        own = Letters(
            own.images, own.classes[torch.randperm(len(own.classes), generator=torch.Generator().manual_seed(7))]
        )
    about: dict[str, Any] = {"what": "scripts expert", "version": _VERSION, "script": name, "bad": name == kind.bad}
    about |= {
        "optimiser": kind.optimiser,
        "rate": kind.rate,
        "steps": kind.steps,
        "shared": kind.shared,
        "seed": kind.seed,
    }
    seed = 1000 * kind.seed + 1 + list(SCRIPTS).index(name)

    def train(model: Classifier) -> None:
        _learn(model, own, kind.steps, kind.rate, kind.optimiser, seed, f"{kind.optimiser} {name}")

    return trained(cache, about, lambda: _like(start, own.count), train)


def _like(start: Classifier, classes: int) -> Classifier:
    """The body of another model under a head of its own that begins at nothing."""
    model = Classifier(classes)
    model.body.load_state_dict(start.body.state_dict())
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def _learn(model: Classifier, of: Letters, steps: int, rate: float, optimiser: str, seed: int, what: str) -> None:
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        images, classes = batch(of, _BATCH, generator)
        return nn.functional.cross_entropy(model(images), classes)

    if optimiser == "adam":
        fit(model, loss, steps, rate, optimiser, what)
        return
    # A head that begins at nothing learns by Adam first, so that the body's first gradients mean something.
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    fit(model, loss, max(1, steps // 3), 3e-3, "adam", f"{what}'s head")
    for parameter in model.body.parameters():
        parameter.requires_grad_(True)
    fit(model, loss, steps, rate, optimiser, what)


def _held_out(of: Letters) -> tuple[Tensor, Tensor]:
    return batch(of, _HELD_OUT, torch.Generator().manual_seed(12345))


@torch.no_grad()
def _hits(body: nn.Module, head: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return head(body(images)).argmax(1) == classes
