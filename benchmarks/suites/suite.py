"""What a suite is: a base, experts of it, and for any model what it makes of every task's held-out examples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Of each task, (examples,): 1 where an example is labelled rightly, or the mean log likelihood of a byte in it.
Outcome = Mapping[str, Tensor]
_DRAWS = 1000


@dataclass(frozen=True)
class Prepared:
    """A suite that is trained. `outcome` scores a model on every task, each with its own expert's head where it has
    one. `likelihood`: outcomes are log likelihoods and not hits.
    """

    base: nn.Module
    experts: Mapping[str, nn.Module]
    outcome: Callable[[nn.Module], Outcome]
    alone: Outcome  # of each task by its own expert
    likelihood: bool = False


@dataclass(frozen=True)
class Suite:
    """`purpose`: whether a rule may be chosen by it, or only confirmed. Stated before anything was looked at."""

    name: str
    purpose: Literal["choosing", "confirming"]
    about: str
    prepare: Callable[[Path], Prepared]


def points(found: Outcome, alone: Outcome, likelihood: bool) -> float:
    """100 for the experts. Of hits the mean over the tasks of accuracy / the expert's own; of likelihoods the mean of
    `exp(l - l_expert)`, the share that is kept of the probability of a byte.
    """
    shares = [_share(found[task].double().mean(), alone[task].double().mean(), likelihood) for task in found]
    return 100 * float(torch.stack(shares).mean())


def _share(mean: Tensor, own: Tensor, likelihood: bool) -> Tensor:
    return (mean - own).exp() if likelihood else mean / own


def draws(found: Outcome, alone: Outcome, likelihood: bool) -> Tensor:
    """`points` on 1,000 other draws of the held-out examples, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(_DRAWS, dtype=torch.float64)
    for task, outcome in found.items():
        drawn = torch.randint(len(outcome), (_DRAWS, len(outcome)), generator=generator)
        means = outcome.double()[drawn].mean(1), alone[task].double()[drawn].mean(1)
        total += _share(*means, likelihood)
    return 100 * total / len(found)


def trained(
    cache: Path, about: Mapping[str, object], make: Callable[[], nn.Module], train: Callable[[nn.Module], None]
):
    """The module that `make` gives and `train` trains, kept in the cache by all that decides its weights."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = cache / f"{digest}.safetensors"
    module = make()
    if file.is_file():
        module.load_state_dict(load_file(file))
        return module.eval()
    train(module)
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial-{os.getpid()}")
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, partial)
    os.replace(partial, file)
    return module.eval()
